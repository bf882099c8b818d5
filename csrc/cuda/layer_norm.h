// LayerNorm over the last dimension of dense rows, forward and backward, on a GPU.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/stream.h"

namespace warploom::cuda {

// The widest rows, which a block of threads holds in registers; the sums for the weights just fit the 99 KiB of shared
// memory of the smaller cards.
template <class T>
constexpr int max_norm_width() {
  return sizeof(T) == 4 ? 8192 : 12288;
}

template <class T>
struct LayerNormFwd {
  const T *x, *residual;   // (N, C); residual may be null
  const T *weight, *bias;  // (C,); bias may be null
  T *y, *stream;           // (N, C); stream = residual + x, where there is a residual
  float *mean, *rstd;      // (N,)
  int64_t N;
  int C;
  float eps;
};

template <class T>
struct LayerNormBwd {
  const T *dy, *dstream, *x;  // (N, C); dstream may be null
  const T* weight;            // (C,)
  const float *mean, *rstd;   // (N,)
  T* dx;                      // (N, C)
  T *dweight, *dbias;         // (C,)
  float* partials;            // (num_partials, 2, C): sums over the rows of one block, for dweight and dbias
  int num_partials;           // layer_norm_num_partials<T>(N, C)
  int64_t N;
  int C;
};

// How many blocks share the rows of a backward pass, on the current device.
template <class T>
int layer_norm_num_partials(int64_t N, int C);

// T: float, bf16, fp16. C is at most max_norm_width<T>().
template <class T>
void launch_layer_norm_fwd(const LayerNormFwd<T>& arguments, Stream stream);
template <class T>
void launch_layer_norm_bwd(const LayerNormBwd<T>& arguments, Stream stream);

}  // namespace warploom::cuda
