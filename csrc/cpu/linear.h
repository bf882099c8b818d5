// y = activation(x weight^T + bias), forward and backward. Rows M, width in C, width out F; all contiguous.
//
// T is the type of the activations, W that of the parameters and their gradients: T itself, or float for master weights
// that are rounded to T on their way into the product.
#pragma once

#include "common/dtypes.h"
#include "common/levels.h"

namespace warploom::cpu {

enum class Activation { kNone, kRelu, kRelu2, kGelu, kGeluTanh, kSilu };

template <class T, class W>
struct LinearForward {
  const T* x;          // (M, C)
  const W* weight;     // (F, C)
  const W* bias;       // (F,), or null
  const void* packed;  // the weight as pack() leaves it, or null: then it is packed here
  T* y;                // (M, F)
  T* h;                // (M, F): receives the sums before the activation, or null
  Activation activation;
  int64_t M, C, F;
  bool transposed;  // the weight is (C, F) in memory; the gradient of it too
};

template <class T, class W>
struct LinearBackward {
  const T* dy;      // (M, F)
  const T* x;       // (M, C)
  const W* weight;  // (F, C)
  const void* packed;
  // (M, F): what the activation's derivative is taken from: y for ReLU, else h. Null without an activation.
  const T* saved;
  T* dx;       // (M, C), or null: not wanted; likewise the next two
  W* dweight;  // (F, C)
  W* dbias;    // (F,); not without dweight
  Activation activation;
  int64_t M, C, F;
  bool transposed;
};

template <class T, class W>
struct LinearKernelsOf {
  void (*fwd)(const LinearForward<T, W>&);
  void (*bwd)(const LinearBackward<T, W>&);
  // The weight (F, C) as the forward wants it and the backward can read it too; see packed_weight.h.
  void (*pack)(const W* weight, int64_t F, int64_t C, void* packed);
};

template <class T>
struct LinearKernels {
  LinearKernelsOf<T, T> same;
  LinearKernelsOf<T, float> master;
  int64_t (*packed_bytes)(int64_t F, int64_t C);
};

using LinearTable = PerDtype<LinearKernels>;

WARPLOOM_DISPATCH(LinearTable, linear)

}  // namespace warploom::cpu
