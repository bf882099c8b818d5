#include "cpu/linear_relu.h"

#include "bindings/binding.h"

namespace warploom::bindings {
namespace {

// x (..., C) -> (..., F)
std::vector<int64_t> output_shape(const Tensor& x, int64_t F) {
  auto shape = x.sizes().vec();
  shape.back() = F;
  return shape;
}

Tensor linear_relu_fwd(const Tensor& x_any, const Tensor& weight_any, const OptionalTensor& bias_any) {
  const int64_t C = x_any.size(-1), F = weight_any.size(0);
  check("weight", weight_any, {F, C}, x_any.scalar_type());
  check("bias", bias_any, {F}, x_any.scalar_type());
  const Tensor x = x_any.contiguous(), weight = weight_any.contiguous();
  const OptionalTensor bias = contiguous(bias_any);

  Tensor y = at::empty(output_shape(x, F), x.options());
  switch_dtype(x, [&](auto element) {
    using T = decltype(element);
    cpu::linear_relu().get(element).fwd({data<T>(x), data<T>(weight), data<T>(bias), data<T>(y), rows(x), C, F});
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> linear_relu_bwd(const Tensor& dy_any, const Tensor& x_any, const Tensor& weight_any,
                                                   const Tensor& y_any) {
  const int64_t C = x_any.size(-1), F = weight_any.size(0);
  const auto dtype = x_any.scalar_type();
  check("dy", dy_any, output_shape(x_any, F), dtype);
  check("weight", weight_any, {F, C}, dtype);
  check("y", y_any, output_shape(x_any, F), dtype);
  const Tensor dy = dy_any.contiguous(), x = x_any.contiguous(), weight = weight_any.contiguous();
  const Tensor y = y_any.contiguous();

  Tensor dx = at::empty_like(x), dweight = at::empty_like(weight), dbias = at::empty({F}, weight.options());
  switch_dtype(x, [&](auto element) {
    using T = decltype(element);
    cpu::linear_relu().get(element).bwd({data<T>(dy), data<T>(x), data<T>(weight), data<T>(y), data<T>(dx),
                                         data<T>(dweight), data<T>(dbias), rows(x), C, F});
  });
  return {dx, dweight, dbias};
}

TORCH_LIBRARY_FRAGMENT(warploom_cpu, m) {
  m.def("linear_relu_fwd(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("linear_relu_bwd(Tensor dy, Tensor x, Tensor weight, Tensor y) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(warploom_cpu, CPU, m) {
  m.impl("linear_relu_fwd", linear_relu_fwd);
  m.impl("linear_relu_bwd", linear_relu_bwd);
}

}  // namespace
}  // namespace warploom::bindings
