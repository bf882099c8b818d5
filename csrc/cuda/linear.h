// y = relu(x weight^T + bias) with a bit for each element that is positive, and its gradients, on a GPU.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/stream.h"

namespace warploom::cuda {

// Of a row of F bits: a multiple of 16 bytes. Bit i of word w is that of column 32 w + i.
constexpr int64_t mask_words(int64_t F) { return (F + 127) / 128 * 4; }

// One of the three products. All matrices are dense and row-major; C and F are multiples of 8 and every pointer of 16
// bytes, since rows are copied in pieces of that size.
enum class LinearProduct {
  kForward,  // y = x weight^T + bias, through the ReLU and with its mask where there is one
  kInput,    // dx = dh weight
  kWeight,   // dweight = dh^T x, dbias = sums of dh over rows
};

template <class T>
struct Linear {
  const T *x, *weight;  // (N, C), (F, C)
  const T* bias;        // (F,), may be null
  const T* dy;          // (N, F); dh is dy where the mask has ones
  bool relu;
  // (N, mask_words(F)), written by kForward and read by the others; null where there is no ReLU or no way back.
  uint32_t* mask;
  void* result;  // y, dx or dweight: T, or float
  bool result_is_float;
  void* dbias;  // (F,), as the result; may be null
  int64_t N;
  int C, F;
};

// T: bf16, fp16.
template <class T>
void launch_linear(LinearProduct product, const Linear<T>& arguments, Stream stream);

// dh (N, F) = dy where the mask has ones, for products that do not apply it themselves.
template <class T>
void launch_linear_mask(const T* dy, const uint32_t* mask, T* dh, int64_t N, int F, Stream stream);

}  // namespace warploom::cuda
