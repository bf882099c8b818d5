// One step of AdamW (Loshchilov and Hutter, 2019) over many tensors, in place. The arithmetic is float, double for
// double, in the order of torch's fused AdamW.
#pragma once

#include "common/dtypes.h"
#include "common/levels.h"

namespace warploom::cpu {

// One parameter with all that belongs to it, each without gaps and in the same order of elements.
template <class T, class Grad>
struct AdamWTensor {
  T* param;
  Grad* grad;
  T* exp_avg;
  T* exp_avg_sq;
  T* max_exp_avg_sq;  // null without AMSGrad
  int64_t size;
  int64_t columns;           // of a row-major matrix; 1 for anything else
  double step_size;          // lr / (1 - beta1^step)
  double denominator_scale;  // 1 / sqrt(1 - beta2^step)
  // Null, or for a float matrix (size / columns, columns): receives its panels for bf16 activations (packed_weight.h).
  void* packed;
};

struct AdamWOptions {
  double beta1, beta2, eps;
  double decay;        // what each parameter is multiplied by: 1 - lr * weight_decay
  double grad_factor;  // what each gradient is multiplied by first
  bool clear_grads;    // write zeros into the gradients
};

template <class T, class Grad>
using AdamWStep = void (*)(const AdamWTensor<T, Grad>* tensors, int64_t count, const AdamWOptions& options);

template <class T>
struct AdamWKernels {
  AdamWStep<T, T> step;
};

struct AdamWTable : PerDtype<AdamWKernels> {
  AdamWStep<float, bf16> step_of_float_by_bf16;  // parameters float, gradients bf16
};

WARPLOOM_DISPATCH(AdamWTable, adamw)

}  // namespace warploom::cpu
