// y = relu(x weight^T + bias), forward and backward. Rows M, width in C, width out F; all contiguous.
#pragma once

#include "common/dtypes.h"
#include "common/levels.h"

namespace warploom::cpu {

template <class T>
struct LinearReluForward {
  const T* x;       // (M, C)
  const T* weight;  // (F, C)
  const T* bias;    // (F,), or null
  T* y;             // (M, F)
  int64_t M, C, F;
};

// The gradient before the ReLU is dy where y is positive, and 0 elsewhere.
template <class T>
struct LinearReluBackward {
  const T* dy;      // (M, F)
  const T* x;       // (M, C)
  const T* weight;  // (F, C)
  const T* y;       // (M, F)
  T* dx;            // (M, C)
  T* dweight;       // (F, C)
  T* dbias;         // (F,)
  int64_t M, C, F;
};

template <class T>
struct LinearReluKernels {
  void (*fwd)(const LinearReluForward<T>&);
  void (*bwd)(const LinearReluBackward<T>&);
};

using LinearReluTable = PerDtype<LinearReluKernels>;

WARPLOOM_DISPATCH(LinearReluTable, linear_relu)

}  // namespace warploom::cpu
