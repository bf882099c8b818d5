// The backward of linear layers that share their input x, such as the three projections of attention.
#pragma once

#include "common/dtypes.h"
#include "common/levels.h"

namespace warploom::cpu {

// T and W as in linear.h. dx is the sum over the layers, which have no activations.
template <class T, class W>
struct LinearsBackward {
  struct Layer {
    const T* dy;         // (M, F)
    const W* weight;     // (F, C)
    const void* packed;  // or null
    W* dweight;          // (F, C), or null: not wanted; then nor is dbias
    W* dbias;            // (F,), or null
    int64_t F;
    bool transposed = false;  // weight and dweight are (C, F) in memory
  };
  const T* x;  // (M, C)
  T* dx;       // (M, C), or null
  const Layer* layers;
  int count;
  int64_t M, C;
};

template <class T, class W>
struct LinearQkvKernelsOf {
  void (*bwd)(const LinearsBackward<T, W>&);
};

template <class T>
struct LinearQkvKernels {
  LinearQkvKernelsOf<T, T> same;
  LinearQkvKernelsOf<T, float> master;
};

using LinearQkvTable = PerDtype<LinearQkvKernels>;

WARPLOOM_DISPATCH(LinearQkvTable, linear_qkv)

}  // namespace warploom::cpu
