// Rotary position embedding: feature pairs (i, i + half) turned by an angle proportional to the position.
#pragma once

#include "common/dtypes.h"
#include "common/levels.h"

namespace warploom::cpu {

template <class T>
struct Rotary {
  // x (num_rows, num_heads, num_tokens, D) by these strides, in elements; features lie side by side.
  const T* x;
  int64_t row_stride, head_stride, token_stride;
  const int64_t* positions;  // (num_tokens,), or (num_rows, num_tokens) if each row has its own
  bool each_row;
  T* y;  // (num_rows, num_tokens, num_heads, D)
  int64_t num_rows, num_heads, num_tokens, D, rotary_dim;
  double base;
  int direction;  // 1, or -1 to turn back
};

template <class T>
struct RotaryKernels {
  void (*turn)(const Rotary<T>& args);
};

using RotaryTable = PerDtype<RotaryKernels>;

WARPLOOM_DISPATCH(RotaryTable, rotary)

}  // namespace warploom::cpu
