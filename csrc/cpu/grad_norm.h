// The Euclidean norm of all elements of many tensors. Squares are summed in double: neither their number nor their size
// costs digits.
#pragma once

#include "common/dtypes.h"
#include "common/levels.h"

namespace warploom::cpu {

template <class T>
struct GradTensor {
  const T* grad;
  int64_t size;
};

template <class T>
struct GradNormKernels {
  double (*fwd)(const GradTensor<T>* tensors, int64_t count);
};

using GradNormTable = PerDtype<GradNormKernels>;

WARPLOOM_DISPATCH(GradNormTable, grad_norm)

}  // namespace warploom::cpu
