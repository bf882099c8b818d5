// Cross-entropy of logits = hidden weight^T, N by V, which are never held whole. Either the forward keeps each row's
// log-sum-exp, and the backward computes the logits again, some words at a time, and with them the gradients: where
// products are cheap. Or the forward makes the gradients as well, some rows at a time.
#pragma once

#include "common/dtypes.h"
#include "common/levels.h"

namespace warploom::cpu {

// T is the type of the hidden states, W that of the weight and its gradient: T itself, or float.
template <class T, class W>
struct LinearCrossEntropyForward {
  const T* hidden;         // (N, C)
  const W* weight;         // (V, C)
  const int64_t* targets;  // (N,), at most V where not ignored; V is a word of another shard
  int64_t ignore_index;
  typename Accumulator<T>::type* lse;  // (N,): natural log of the sum of exponentials
  double* loss;                        // the sum over the rows that are not ignored, nats
  T* dhidden;                          // (N, C): gradient of that sum, or null: not wanted
  W* dweight;                          // (V, C), or null
  int64_t N, C, V;
};

template <class T, class W>
struct LinearCrossEntropyBackward {
  const T* hidden;
  const W* weight;
  const int64_t* targets;
  int64_t ignore_index;
  const typename Accumulator<T>::type* lse;
  double scale;  // of the gradients: that of the summed loss
  T* dhidden;    // (N, C), or null: not wanted
  W* dweight;    // (V, C), or null
  int64_t N, C, V;
};

template <class T, class W>
struct LinearCrossEntropyKernelsOf {
  void (*fwd)(const LinearCrossEntropyForward<T, W>&);
  void (*bwd)(const LinearCrossEntropyBackward<T, W>&);
};

template <class T>
struct LinearCrossEntropyKernels {
  LinearCrossEntropyKernelsOf<T, T> same;
  LinearCrossEntropyKernelsOf<T, float> master;
};

using LinearCrossEntropyTable = PerDtype<LinearCrossEntropyKernels>;

WARPLOOM_DISPATCH(LinearCrossEntropyTable, linear_cross_entropy)

}  // namespace warploom::cpu
