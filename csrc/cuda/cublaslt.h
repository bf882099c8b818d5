// Matrix products with an epilogue by NVIDIA's cuBLASLt. The library is loaded when it is first asked for, so that the
// build needs neither its headers nor its presence.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "common/stream.h"

namespace warploom::cuda::cublaslt {

// Loads the library by file name or path, once for a process: later calls return what the first one that succeeded
// loaded. Returns its version, 130100 for 13.1.0. Throws std::runtime_error.
int load(const std::string& library);

// The numbers are the library's own.
enum class Type : int32_t { kFloat = 0, kHalf = 2, kBFloat16 = 14 };
enum class Epilogue : uint32_t {
  kNone = 1,
  kRelu = 2,
  kBias = 4,
  kReluBias = 6,
  kReluMask = 130,      // RELU_AUX
  kReluMaskBias = 134,  // RELU_AUX_BIAS
  kSumOfB = 512,        // BGRADB
};

// d (m, n) = epilogue(op(a) op(b)), summed over k in float. Matrices are column-major and dense: a is (m, k), or (k, m)
// if it is to be transposed, b is (k, n) or (n, k). Pointers are multiples of 16 bytes.
struct Product {
  const void *a = nullptr, *b = nullptr;
  void* d = nullptr;
  int64_t m, n, k;
  bool transpose_a = false, transpose_b = false;
  Type type, d_type;  // of a and b; of d and bias
  Epilogue epilogue = Epilogue::kNone;
  void* bias = nullptr;   // read (m,) by those with Bias; kSumOfB writes (n,): the sums of op(b) over k
  void* mask = nullptr;   // written by those with Mask: a bit for each element of d that is positive
  int64_t mask_bits = 0;  // of a column: a multiple of 128, m or more
};

// How the library runs a product, whatever its pointers are.
struct Plan {
  std::array<uint64_t, 8> algorithm;
  size_t workspace_bytes;
};

// Nothing if the library has no kernel for such a product on the current device, which has this index. Plans are kept.
std::optional<Plan> plan(const Product& product, int device);

void run(const Product& product, const Plan& plan, int device, void* workspace, Stream stream);

}  // namespace warploom::cuda::cublaslt
