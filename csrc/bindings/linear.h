// What the bindings of linear layers share.
#pragma once

#include "bindings/binding.h"
#include "cpu/linear.h"

namespace warploom::bindings {

// x (..., C) -> (..., F)
inline std::vector<int64_t> output_shape(const Tensor& x, int64_t F) {
  auto shape = x.sizes().vec();
  shape.back() = F;
  return shape;
}

// Of x (..., C) the rows, which the number of its elements does not tell if C is 0.
inline int64_t num_rows(const Tensor& x) { return c10::multiply_integers(x.sizes().slice(0, x.dim() - 1)); }

inline int64_t packed_bytes(const Tensor& weight, at::ScalarType dtype) {
  int64_t bytes = 0;
  switch_dtype(at::empty({0}, dtype),
               [&](auto element) { bytes = cpu::linear().get(element).packed_bytes(weight.size(0), weight.size(1)); });
  return bytes;
}

inline void check_packed(const Tensor& packed, const Tensor& weight, at::ScalarType dtype) {
  check("packed", packed, {packed_bytes(weight, dtype)}, at::kByte);
  TORCH_CHECK_VALUE(packed.is_contiguous(), "packed must be contiguous");
}

// The packed weight, null if there is none.
inline const void* checked_packed(const OptionalTensor& packed, const Tensor& weight, const Tensor& x) {
  if (!packed.has_value()) return nullptr;
  check_packed(*packed, weight, x.scalar_type());
  return packed->const_data_ptr();
}

}  // namespace warploom::bindings
