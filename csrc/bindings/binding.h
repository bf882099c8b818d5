// What every binding needs: checks of operator arguments, the switch over dtypes, raw pointers. Include this instead of
// torch/extension.h, which takes several times as long to compile.
//
// The operators of torch.ops.warploom_cpu and warploom_cuda are called by the operators of torch.ops.warploom alone
// (engine/warploom/ops), which the public functions have checked; the checks here are what keeps a direct call from
// reading out of bounds.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <type_traits>

#include "common/dtypes.h"

namespace warploom::bindings {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Calls body with a value of the element type, which only carries that type.
template <class Body>
void switch_dtype(const Tensor& tensor, Body&& body) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return body(float{});
    case at::kDouble:
      return body(double{});
    case at::kBFloat16:
      return body(bf16{});
    case at::kHalf:
      return body(fp16{});
    default:
      TORCH_CHECK_TYPE(false, "expected float32, float64, bfloat16 or float16, got ", tensor.scalar_type());
  }
}

// The same for the kernels of csrc/cuda, which do not compute in float64.
template <class Body>
void switch_gpu_dtype(const Tensor& tensor, Body&& body) {
  TORCH_CHECK_TYPE(tensor.scalar_type() != at::kDouble, "expected float32, bfloat16 or float16, got float64");
  switch_dtype(tensor, [&](auto element) {
    if constexpr (!std::is_same_v<decltype(element), double>) body(element);
  });
}

template <class T>
T* data(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}
template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
// Null where there is no tensor.
template <class T>
const T* data(const OptionalTensor& tensor) {
  return tensor.has_value() ? data<T>(*tensor) : nullptr;
}

inline void check(const char* name, const Tensor& tensor, at::IntArrayRef shape, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " must be ", shape, ", got ", tensor.sizes());
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ", tensor.scalar_type());
}
inline void check(const char* name, const OptionalTensor& tensor, at::IntArrayRef shape, at::ScalarType dtype) {
  if (tensor.has_value()) check(name, *tensor, shape, dtype);
}

// A parameter matrix (F, C) that goes with x (..., C) is of x's dtype, or float32 where x has 16 bits.
inline void check_parameter(const char* name, const Tensor& parameter, const Tensor& x) {
  TORCH_CHECK_VALUE(parameter.dim() == 2 && x.dim() > 0 && parameter.size(1) == x.size(-1), name, " must be (F, ",
                    x.size(-1), "), got ", parameter.sizes());
  TORCH_CHECK_TYPE(parameter.scalar_type() == x.scalar_type() ||
                       (parameter.scalar_type() == at::kFloat && x.scalar_type() != at::kDouble),
                   name, " must be ", x.scalar_type(), " or Float, got ", parameter.scalar_type());
}

// Calls body(kernels, element of x, element of parameter) with those of the table for this pair of dtypes.
template <class Table, class Body>
void switch_parameter(const Table& table, const Tensor& x, const Tensor& parameter, Body&& body) {
  switch_dtype(x, [&](auto element) {
    const auto& kernels = table.get(element);
    if (x.scalar_type() == parameter.scalar_type()) return body(kernels.same, element, element);
    if constexpr (!std::is_same_v<decltype(element), double>) return body(kernels.master, element, float{});
  });
}

inline OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}

// The number of rows of a (..., C) tensor with at least one column.
inline int64_t rows(const Tensor& tensor) { return tensor.numel() / tensor.size(-1); }

// What statistics over elements of this dtype are kept in.
inline at::ScalarType accumulator(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

}  // namespace warploom::bindings
