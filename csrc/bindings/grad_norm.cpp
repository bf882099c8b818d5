#include "cpu/grad_norm.h"

#include <ATen/ops/scalar_tensor.h>

#include "bindings/binding.h"

namespace warploom::bindings {
namespace {

Tensor grad_norm_fwd(at::TensorList grads) {
  TORCH_CHECK_VALUE(!grads.empty(), "grads must hold at least one tensor");
  const auto dtype = grads[0].scalar_type();
  TORCH_CHECK_TYPE(at::isFloatingType(dtype), "grads must be floating point, got ", dtype);
  std::vector<Tensor> dense;
  dense.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    TORCH_CHECK_TYPE(grads[i].scalar_type() == dtype, "grads[", i, "] must be ", dtype, " as grads[0] is, got ",
                     grads[i].scalar_type());
    // The order of the elements does not matter, gaps between them do.
    dense.push_back(grads[i].is_non_overlapping_and_dense() ? grads[i] : grads[i].contiguous());
  }
  double norm = 0.0;
  switch_dtype(grads[0], [&](auto element) {
    using T = decltype(element);
    std::vector<cpu::GradTensor<T>> tensors;
    tensors.reserve(dense.size());
    for (const Tensor& grad : dense) tensors.push_back({data<T>(grad), grad.numel()});
    norm = cpu::grad_norm().get(element).fwd(tensors.data(), static_cast<int64_t>(tensors.size()));
  });
  // By way of double: a norm beyond float is infinity, where scalar_tensor in float would be an error.
  return at::scalar_tensor(norm, grads[0].options().dtype(at::kDouble)).to(accumulator(dtype));
}

TORCH_LIBRARY_FRAGMENT(warploom_cpu, m) { m.def("grad_norm_fwd(Tensor[] grads) -> Tensor"); }

TORCH_LIBRARY_IMPL(warploom_cpu, CPU, m) { m.impl("grad_norm_fwd", grad_norm_fwd); }

}  // namespace
}  // namespace warploom::bindings
