// Arguments and kernel tables shared by layer_norm and rms_norm. N rows of C elements, contiguous; statistics are one
// number per row in the accumulator's type. Sums run in float, in double for double.
#pragma once

#include "common/dtypes.h"

namespace warploom::cpu {

template <class T>
struct NormForward {
  const T* x;                           // (N, C)
  const T* residual;                    // (N, C), or null
  const T* weight;                      // (C,)
  const T* bias;                        // (C,), or null
  T* y;                                 // (N, C)
  T* stream;                            // (N, C): residual + x, or null without residual
  typename Accumulator<T>::type* mean;  // (N,); layer_norm only
  typename Accumulator<T>::type* rstd;  // (N,)
  int64_t N, C;
  double eps;
};

template <class T>
struct NormBackward {
  const T* dy;                                // (N, C)
  const T* dstream;                           // (N, C), or null: added to dx
  const T* x;                                 // (N, C): what was normalised
  const T* weight;                            // (C,)
  const typename Accumulator<T>::type* mean;  // (N,); layer_norm only
  const typename Accumulator<T>::type* rstd;  // (N,)
  T* dx;                                      // (N, C)
  T* dweight;                                 // (C,)
  T* dbias;                                   // (C,); layer_norm only
  int64_t N, C;
};

template <class T>
struct NormKernels {
  void (*fwd)(const NormForward<T>&);
  void (*bwd)(const NormBackward<T>&);
};

using NormTable = PerDtype<NormKernels>;

}  // namespace warploom::cpu
