// A cuBLASLt for the CPU: the functions that csrc/cuda/cublaslt.cpp looks up, by what cublasLt.h says of them. Refuses
// what the library would (sizes of attributes, leading dimensions, alignment), computes products and epilogues in
// float, and writes every product it is asked for as a line of JSON to the file FAKE_CUBLASLT_LOG names. It has no
// kernel for results of FAKE_CUBLASLT_LACKS rows.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "common/ptx.cuh"

using warploom::bf16;
using warploom::fp16;

namespace {

enum Status { kSuccess = 0, kInvalidValue = 7, kNotSupported = 15 };
enum Type { kFloat = 0, kHalf = 2, kBFloat16 = 14 };
enum Epilogue : uint32_t { kDefault = 1, kRelu = 2, kBias = 4, kAux = 128, kBGradB = 512 };

struct Desc {
  int32_t transpose_a = 0, transpose_b = 0;
  uint32_t epilogue = kDefault;
  void* bias = nullptr;
  void* aux = nullptr;
  int64_t aux_ld = 0;
};

struct Layout {
  int type;
  int64_t rows, cols, ld;
};

struct Preference {
  uint64_t workspace = 0;
  uint32_t reductions = 7;
  uint32_t alignments[4] = {256, 256, 256, 256};
};

struct Problem {
  int64_t m, n, k;
  Status status;
};

bool aligned(const void* pointer) { return pointer != nullptr && reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool is_sound(const Layout& layout) {
  const int64_t size = layout.type == kFloat ? 4 : 2;
  return layout.rows > 0 && layout.cols > 0 && layout.ld >= layout.rows && layout.ld * size % 16 == 0;
}

Problem problem_of(const Desc& desc, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
  Problem p = {desc.transpose_a ? a.cols : a.rows, desc.transpose_b ? b.rows : b.cols,
               desc.transpose_a ? a.rows : a.cols, kInvalidValue};
  const bool known = desc.epilogue == kDefault || desc.epilogue == kRelu || desc.epilogue == kBias ||
                     desc.epilogue == (kRelu | kBias) || desc.epilogue == (kRelu | kAux) ||
                     desc.epilogue == (kRelu | kAux | kBias) || desc.epilogue == kBGradB;
  const bool fits = (desc.transpose_b ? b.cols : b.rows) == p.k && d.rows == p.m && d.cols == p.n && c.rows == d.rows &&
                    c.cols == d.cols && c.type == d.type && c.ld == d.ld;
  const bool types = a.type == b.type && a.type != kFloat && (d.type == a.type || d.type == kFloat);
  const bool aux = !(desc.epilogue & kAux) || (aligned(desc.aux) && desc.aux_ld % 128 == 0 && desc.aux_ld >= p.m);
  const bool bias = !(desc.epilogue & (kBias | kBGradB)) || aligned(desc.bias);
  if (known && fits && types && aux && bias && is_sound(a) && is_sound(b) && is_sound(d)) p.status = kSuccess;
  const char* const lacks = std::getenv("FAKE_CUBLASLT_LACKS");
  if (lacks != nullptr && std::atoll(lacks) == p.m) p.status = kNotSupported;
  return p;
}

// What the heuristic says is for this problem alone.
uint64_t algorithm_of(const Desc& desc, const Problem& p) {
  return static_cast<uint64_t>(p.m * 1000003 + p.n * 1009 + p.k) * 1024 + desc.epilogue;
}
constexpr size_t kWorkspace = 48;

float at(const void* data, int type, int64_t index) {
  if (type == kFloat) return static_cast<const float*>(data)[index];
  if (type == kHalf) return warploom::ptx::to_float(static_cast<const fp16*>(data)[index]);
  return warploom::ptx::to_float(static_cast<const bf16*>(data)[index]);
}

void put(void* data, int type, int64_t index, float value) {
  if (type == kFloat) {
    static_cast<float*>(data)[index] = value;
  } else if (type == kHalf) {
    static_cast<fp16*>(data)[index] = warploom::ptx::from_float<fp16>(value);
  } else {
    static_cast<bf16*>(data)[index] = warploom::ptx::from_float<bf16>(value);
  }
}

template <class Value>
Status take(Value& target, const void* value, size_t size) {
  if (value == nullptr || size != sizeof(Value)) return kInvalidValue;
  std::memcpy(&target, value, size);
  return kSuccess;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT size_t cublasLtGetVersion() { return 130100; }
EXPORT const char* cublasLtGetStatusString(Status status) {
  return status == kInvalidValue ? "an unsupported value or parameter was passed to the function" : "not supported";
}
EXPORT Status cublasLtCreate(void** handle) {
  static int context;
  *handle = &context;
  return kSuccess;
}
EXPORT Status cublasLtMatmulDescCreate(Desc** desc, int compute, int scale) {
  if (compute != 68 || scale != kFloat) return kInvalidValue;
  *desc = new Desc;
  return kSuccess;
}
EXPORT Status cublasLtMatmulDescSetAttribute(Desc* desc, int attribute, const void* value, size_t size) {
  switch (attribute) {
    case 3:
      return take(desc->transpose_a, value, size);
    case 4:
      return take(desc->transpose_b, value, size);
    case 7:
      return take(desc->epilogue, value, size);
    case 8:
      return take(desc->bias, value, size);
    case 11:
      return take(desc->aux, value, size);
    case 12:
      return take(desc->aux_ld, value, size);
    default:
      return kInvalidValue;
  }
}
EXPORT Status cublasLtMatmulDescDestroy(Desc* desc) {
  delete desc;
  return kSuccess;
}
EXPORT Status cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t cols, int64_t ld) {
  *layout = new Layout{type, static_cast<int64_t>(rows), static_cast<int64_t>(cols), ld};
  return kSuccess;
}
EXPORT Status cublasLtMatrixLayoutDestroy(Layout* layout) {
  delete layout;
  return kSuccess;
}
EXPORT Status cublasLtMatmulPreferenceCreate(Preference** preference) {
  *preference = new Preference;
  return kSuccess;
}
EXPORT Status cublasLtMatmulPreferenceSetAttribute(Preference* preference, int attribute, const void* value,
                                                   size_t size) {
  if (attribute == 1) return take(preference->workspace, value, size);
  if (attribute == 3) return take(preference->reductions, value, size);
  if (attribute >= 5 && attribute <= 8) return take(preference->alignments[attribute - 5], value, size);
  return kInvalidValue;
}
EXPORT Status cublasLtMatmulPreferenceDestroy(Preference* preference) {
  delete preference;
  return kSuccess;
}

EXPORT Status cublasLtMatmulAlgoGetHeuristic(void*, Desc* desc, Layout* a, Layout* b, Layout* c, Layout* d,
                                             Preference* preference, int wanted, uint64_t* result, int* found) {
  const Problem p = problem_of(*desc, *a, *b, *c, *d);
  *found = 0;
  if (p.status != kSuccess) return p.status;
  for (const uint32_t alignment : preference->alignments) {
    if (alignment != 16) return kInvalidValue;  // of some of the tensors that follow
  }
  if (wanted != 1 || preference->workspace < kWorkspace || preference->reductions != 2) return kInvalidValue;
  *found = 1;
  result[0] = algorithm_of(*desc, p);
  result[8] = kWorkspace;
  result[9] = kSuccess;
  return kSuccess;
}

EXPORT Status cublasLtMatmul(void*, Desc* desc, const float* alpha, const void* a, Layout* a_layout, const void* b,
                             Layout* b_layout, const float* beta, const void* c, Layout* c_layout, void* d,
                             Layout* d_layout, const uint64_t* algorithm, void* workspace, size_t workspace_bytes,
                             void*) {
  const Problem p = problem_of(*desc, *a_layout, *b_layout, *c_layout, *d_layout);
  if (p.status != kSuccess) return p.status;
  if (*alpha != 1.0f || *beta != 0.0f || c != d || *algorithm != algorithm_of(*desc, p)) return kInvalidValue;
  if (!aligned(a) || !aligned(b) || !aligned(d) || workspace_bytes < kWorkspace) return kInvalidValue;
  std::memset(workspace, 0xff, kWorkspace);

  const auto of_a = [&](int64_t i, int64_t k) {
    return at(a, a_layout->type, desc->transpose_a ? k + i * a_layout->ld : i + k * a_layout->ld);
  };
  const auto of_b = [&](int64_t k, int64_t j) {
    return at(b, b_layout->type, desc->transpose_b ? j + k * b_layout->ld : k + j * b_layout->ld);
  };
  auto* const bits = static_cast<unsigned char*>(desc->aux);
  for (int64_t j = 0; j < p.n; ++j) {
    if (desc->epilogue & kAux) std::memset(bits + j * desc->aux_ld / 8, 0, static_cast<size_t>(desc->aux_ld / 8));
    for (int64_t i = 0; i < p.m; ++i) {
      float sum = 0.0f;
      for (int64_t k = 0; k < p.k; ++k) sum += of_a(i, k) * of_b(k, j);
      if (desc->epilogue & kBias) sum += at(desc->bias, d_layout->type, i);
      if (desc->epilogue & kRelu) {
        if ((desc->epilogue & kAux) && sum > 0.0f) bits[j * desc->aux_ld / 8 + i / 8] |= 1 << i % 8;
        sum = sum <= 0.0f ? 0.0f : sum;
      }
      put(d, d_layout->type, i + j * d_layout->ld, sum);
    }
    if (desc->epilogue & kBGradB) {
      float sum = 0.0f;
      for (int64_t k = 0; k < p.k; ++k) sum += of_b(k, j);
      put(desc->bias, d_layout->type, j, sum);
    }
  }
  if (const char* const path = std::getenv("FAKE_CUBLASLT_LOG")) {
    std::FILE* const log = std::fopen(path, "a");
    std::fprintf(log,
                 "{\"m\": %ld, \"n\": %ld, \"k\": %ld, \"transpose_a\": %d, \"transpose_b\": %d, \"type\": %d, "
                 "\"d_type\": %d, \"ld\": [%ld, %ld, %ld], \"epilogue\": %u, \"aux_ld\": %ld}\n",
                 p.m, p.n, p.k, desc->transpose_a, desc->transpose_b, a_layout->type, d_layout->type, a_layout->ld,
                 b_layout->ld, d_layout->ld, desc->epilogue, desc->aux_ld);
    std::fclose(log);
  }
  return kSuccess;
}
