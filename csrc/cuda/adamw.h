// One step of AdamW for many parameters, in place, on a GPU.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/stream.h"

namespace warploom::cuda {

// One parameter; every array has `size` elements.
template <class T, class Grad>
struct AdamWTensor {
  T* param;
  Grad* grad;
  T *exp_avg, *exp_avg_sq, *max_exp_avg_sq;  // the last may be null: no AMSGrad
  bf16* copy;                                // the new values in bfloat16; may be null
  int64_t size;
  float step_size;         // lr / (1 - beta1^step)
  float rsqrt_correction;  // 1 / sqrt(1 - beta2^step)
};

struct AdamWOptions {
  float one_minus_beta1, beta2, one_minus_beta2, eps;
  float decay;        // 1 - lr * weight_decay
  float grad_factor;  // gradients are multiplied by it as they are read; its sign is that of `maximize`
  bool clear_grads;   // leave zeros in them
};

// T, Grad: float, bf16, fp16 for both, or float and bf16. The tensors are read before it returns.
template <class T, class Grad>
void launch_adamw_step(const AdamWTensor<T, Grad>* tensors, int count, const AdamWOptions& options, Stream stream);

}  // namespace warploom::cuda
