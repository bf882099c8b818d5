// Cross-entropy of logits, N by V, against target classes, and its gradient in the same pass over memory.
#pragma once

#include "common/dtypes.h"
#include "common/levels.h"

namespace warploom::cpu {

template <class T>
struct CrossEntropyForward {
  const T* logits;         // (N, V)
  const int64_t* targets;  // (N,), below V where not ignored
  int64_t ignore_index;
  double scale;  // of the gradient: that of the summed loss
  T* dlogits;    // (N, V), may be logits itself; or null: not wanted
  double* loss;  // the sum over the rows that are not ignored, nats
  int64_t N, V;
};

template <class T>
struct CrossEntropyKernels {
  void (*fwd)(const CrossEntropyForward<T>&);
};

using CrossEntropyTable = PerDtype<CrossEntropyKernels>;

WARPLOOM_DISPATCH(CrossEntropyTable, cross_entropy)

}  // namespace warploom::cpu
