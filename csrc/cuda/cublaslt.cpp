// The part of cuBLASLt's C interface that products of linear layers need, declared here by hand. Names, numbers and
// signatures are those of cublasLt.h and cublas_api.h in nvidia-cublas 13.1.0.3; they have not changed since 12.0.
#include "cuda/cublaslt.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <stdexcept>

namespace warploom::cuda::cublaslt {
namespace {

// Pointers to structs of the library's own.
using Handle = void*;
using MatmulDesc = void*;
using MatrixLayout = void*;
using MatmulPreference = void*;

enum Status : int { kSuccess = 0, kNotSupported = 15 };
enum ComputeType : int { kComputeFloat = 68 };  // CUBLAS_COMPUTE_32F
enum Operation : int32_t { kAsItIs = 0, kTransposed = 1 };
enum MatmulDescAttribute : int {
  kTransA = 3,
  kTransB = 4,
  kEpilogue = 7,
  kBiasPointer = 8,
  kMaskPointer = 11,           // EPILOGUE_AUX_POINTER
  kMaskLeadingDimension = 12,  // EPILOGUE_AUX_LD, in bits
};
enum PreferenceAttribute : int {
  kMaxWorkspaceBytes = 1,
  kReductionSchemes = 3,
  kAlignmentA = 5,
  kAlignmentB = 6,
  kAlignmentC = 7,
  kAlignmentD = 8,
};
enum ReductionScheme : uint32_t { kInComputeType = 2 };

struct HeuristicResult {
  uint64_t algorithm[8];
  size_t workspace_bytes;
  Status state;
  float waves;
  int reserved[4];
};

constexpr uint64_t kWorkspaceLimit = 32 << 20;  // what torch allows too, on an H100
constexpr uint32_t kAlignment = 16;

struct Library {
  size_t (*get_version)();
  const char* (*status_string)(Status);
  Status (*create)(Handle*);
  Status (*desc_create)(MatmulDesc*, ComputeType, Type scale_type);
  Status (*desc_set)(MatmulDesc, MatmulDescAttribute, const void* value, size_t value_bytes);
  Status (*desc_destroy)(MatmulDesc);
  Status (*layout_create)(MatrixLayout*, Type, uint64_t rows, uint64_t cols, int64_t leading_dimension);
  Status (*layout_destroy)(MatrixLayout);
  Status (*preference_create)(MatmulPreference*);
  Status (*preference_set)(MatmulPreference, PreferenceAttribute, const void* value, size_t value_bytes);
  Status (*preference_destroy)(MatmulPreference);
  Status (*heuristic)(Handle, MatmulDesc, MatrixLayout a, MatrixLayout b, MatrixLayout c, MatrixLayout d,
                      MatmulPreference, int wanted, HeuristicResult*, int* found);
  Status (*matmul)(Handle, MatmulDesc, const void* alpha, const void* a, MatrixLayout, const void* b, MatrixLayout,
                   const void* beta, const void* c, MatrixLayout, void* d, MatrixLayout, const uint64_t* algorithm,
                   void* workspace, size_t workspace_bytes, Stream);
};

std::mutex mutex;  // of all three
std::optional<Library> loaded;
std::map<int, Handle> handles;  // by device
std::map<std::array<int64_t, 10>, std::optional<Plan>> plans;

template <class Function>
void find(void* object, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(object, name));
  if (function == nullptr) throw std::runtime_error(std::string("cuBLASLt lacks ") + name);
}

Library open(const std::string& name) {
  void* const object = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (object == nullptr) throw std::runtime_error(dlerror());
  Library library = {};
  find(object, "cublasLtGetVersion", library.get_version);
  find(object, "cublasLtGetStatusString", library.status_string);
  find(object, "cublasLtCreate", library.create);
  find(object, "cublasLtMatmulDescCreate", library.desc_create);
  find(object, "cublasLtMatmulDescSetAttribute", library.desc_set);
  find(object, "cublasLtMatmulDescDestroy", library.desc_destroy);
  find(object, "cublasLtMatrixLayoutCreate", library.layout_create);
  find(object, "cublasLtMatrixLayoutDestroy", library.layout_destroy);
  find(object, "cublasLtMatmulPreferenceCreate", library.preference_create);
  find(object, "cublasLtMatmulPreferenceSetAttribute", library.preference_set);
  find(object, "cublasLtMatmulPreferenceDestroy", library.preference_destroy);
  find(object, "cublasLtMatmulAlgoGetHeuristic", library.heuristic);
  find(object, "cublasLtMatmul", library.matmul);
  return library;
}

const Library& library() {
  if (!loaded.has_value()) throw std::runtime_error("cuBLASLt is not loaded");
  return *loaded;
}

void check(Status status, const char* what) {
  if (status != kSuccess) {
    throw std::runtime_error(std::string("cuBLASLt, ") + what + ": " + library().status_string(status));
  }
}

// The library's context on a device.
Handle handle_of(int device) {
  Handle& handle = handles[device];
  if (handle == nullptr) check(library().create(&handle), "cublasLtCreate");
  return handle;
}

class Layout {
 public:
  Layout(Type type, int64_t rows, int64_t cols) {
    check(library().layout_create(&layout_, type, static_cast<uint64_t>(rows), static_cast<uint64_t>(cols), rows),
          "cublasLtMatrixLayoutCreate");
  }
  ~Layout() { library().layout_destroy(layout_); }
  Layout(const Layout&) = delete;
  Layout& operator=(const Layout&) = delete;
  operator MatrixLayout() const { return layout_; }

 private:
  MatrixLayout layout_ = nullptr;
};

bool has_bias(Epilogue epilogue) {
  return (static_cast<uint32_t>(epilogue) & static_cast<uint32_t>(Epilogue::kBias)) != 0 ||
         epilogue == Epilogue::kSumOfB;
}
bool has_mask(Epilogue epilogue) { return epilogue == Epilogue::kReluMask || epilogue == Epilogue::kReluMaskBias; }

// What the library is told of a product.
class Description {
 public:
  explicit Description(const Product& p)
      : a(p.type, p.transpose_a ? p.k : p.m, p.transpose_a ? p.m : p.k),
        b(p.type, p.transpose_b ? p.n : p.k, p.transpose_b ? p.k : p.n),
        d(p.d_type, p.m, p.n) {
    check(library().desc_create(&desc_, kComputeFloat, Type::kFloat), "cublasLtMatmulDescCreate");
    set(kTransA, p.transpose_a ? kTransposed : kAsItIs);
    set(kTransB, p.transpose_b ? kTransposed : kAsItIs);
    set(kEpilogue, p.epilogue);
    if (has_bias(p.epilogue)) set(kBiasPointer, p.bias);
    if (has_mask(p.epilogue)) {
      set(kMaskPointer, p.mask);
      set(kMaskLeadingDimension, p.mask_bits);
    }
  }
  ~Description() { library().desc_destroy(desc_); }
  Description(const Description&) = delete;
  Description& operator=(const Description&) = delete;
  operator MatmulDesc() const { return desc_; }

  const Layout a, b, d;

 private:
  template <class Value>
  void set(MatmulDescAttribute attribute, const Value& value) {
    check(library().desc_set(desc_, attribute, &value, sizeof(value)), "cublasLtMatmulDescSetAttribute");
  }

  MatmulDesc desc_ = nullptr;
};

class Preference {
 public:
  Preference() {
    check(library().preference_create(&preference_), "cublasLtMatmulPreferenceCreate");
    set(kMaxWorkspaceBytes, kWorkspaceLimit);
    // Where k is split, the parts are added as floats, not as what d holds.
    set(kReductionSchemes, kInComputeType);
    for (const auto attribute : {kAlignmentA, kAlignmentB, kAlignmentC, kAlignmentD}) set(attribute, kAlignment);
  }
  ~Preference() { library().preference_destroy(preference_); }
  Preference(const Preference&) = delete;
  Preference& operator=(const Preference&) = delete;
  operator MatmulPreference() const { return preference_; }

 private:
  template <class Value>
  void set(PreferenceAttribute attribute, const Value& value) {
    check(library().preference_set(preference_, attribute, &value, sizeof(value)),
          "cublasLtMatmulPreferenceSetAttribute");
  }

  MatmulPreference preference_ = nullptr;
};

std::optional<Plan> ask(Product product, Handle handle) {
  // The library judges alignment by these addresses, which it does not read.
  product.bias = product.mask = reinterpret_cast<void*>(static_cast<uintptr_t>(kAlignment));
  const Description description(product);
  HeuristicResult result = {};
  int found = 0;
  const Status status = library().heuristic(handle, description, description.a, description.b, description.d,
                                            description.d, Preference(), 1, &result, &found);
  if (status == kNotSupported || (status == kSuccess && (found == 0 || result.state != kSuccess))) return std::nullopt;
  check(status, "cublasLtMatmulAlgoGetHeuristic");
  Plan plan = {{}, result.workspace_bytes};
  for (size_t i = 0; i < plan.algorithm.size(); ++i) plan.algorithm[i] = result.algorithm[i];
  return plan;
}

}  // namespace

int load(const std::string& name) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!loaded.has_value()) loaded = open(name);
  return static_cast<int>(loaded->get_version());
}

std::optional<Plan> plan(const Product& p, int device) {
  const std::lock_guard<std::mutex> lock(mutex);
  const std::array<int64_t, 10> key = {device,
                                       p.m,
                                       p.n,
                                       p.k,
                                       p.transpose_a,
                                       p.transpose_b,
                                       static_cast<int64_t>(p.type),
                                       static_cast<int64_t>(p.d_type),
                                       static_cast<int64_t>(p.epilogue),
                                       p.mask_bits};
  const auto kept = plans.find(key);
  return kept != plans.end() ? kept->second : plans[key] = ask(p, handle_of(device));
}

void run(const Product& product, const Plan& plan, int device, void* workspace, Stream stream) {
  const Description description(product);
  const float one = 1.0f, zero = 0.0f;
  Handle handle = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    handle = handle_of(device);
  }
  check(library().matmul(handle, description, &one, product.a, description.a, product.b, description.b, &zero,
                         product.d, description.d, product.d, description.d, plan.algorithm.data(), workspace,
                         plan.workspace_bytes, stream),
        "cublasLtMatmul");
}

}  // namespace warploom::cuda::cublaslt
