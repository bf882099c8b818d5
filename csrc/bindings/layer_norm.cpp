#include "cpu/layer_norm.h"

#include "bindings/binding.h"

namespace warploom::bindings {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& x_any, const Tensor& weight_any,
                                                          const OptionalTensor& bias_any,
                                                          const OptionalTensor& residual_any, double eps) {
  const int64_t C = x_any.size(-1);
  check("weight", weight_any, {C}, x_any.scalar_type());
  check("bias", bias_any, {C}, x_any.scalar_type());
  check("residual", residual_any, x_any.sizes(), x_any.scalar_type());
  const Tensor x = x_any.contiguous(), weight = weight_any.contiguous();
  const OptionalTensor bias = contiguous(bias_any), residual = contiguous(residual_any);

  Tensor y = at::empty_like(x);
  Tensor stream = residual.has_value() ? at::empty_like(x) : at::empty({0}, x.options());
  Tensor mean = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(accumulator(x.scalar_type())));
  Tensor rstd = at::empty_like(mean);
  switch_dtype(x, [&](auto element) {
    using T = decltype(element);
    using Scalar = typename Accumulator<T>::type;
    cpu::layer_norm().get(element).fwd({data<T>(x), data<T>(residual), data<T>(weight), data<T>(bias), data<T>(y),
                                        data<T>(stream), data<Scalar>(mean), data<Scalar>(rstd), rstd.numel(), C, eps});
  });
  return {y, stream, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dy_any, const OptionalTensor& dstream_any,
                                                  const Tensor& x_any, const Tensor& weight_any, const Tensor& mean_any,
                                                  const Tensor& rstd_any) {
  const int64_t C = x_any.size(-1);
  const auto dtype = x_any.scalar_type();
  const auto rows = x_any.sizes().slice(0, x_any.dim() - 1);
  check("dy", dy_any, x_any.sizes(), dtype);
  check("dstream", dstream_any, x_any.sizes(), dtype);
  check("weight", weight_any, {C}, dtype);
  check("mean", mean_any, rows, accumulator(dtype));
  check("rstd", rstd_any, rows, accumulator(dtype));
  const Tensor dy = dy_any.contiguous(), x = x_any.contiguous(), weight = weight_any.contiguous();
  const Tensor mean = mean_any.contiguous(), rstd = rstd_any.contiguous();
  const OptionalTensor dstream = contiguous(dstream_any);

  Tensor dx = at::empty_like(x), dweight = at::empty_like(weight), dbias = at::empty_like(weight);
  switch_dtype(x, [&](auto element) {
    using T = decltype(element);
    using Scalar = typename Accumulator<T>::type;
    cpu::layer_norm().get(element).bwd({data<T>(dy), data<T>(dstream), data<T>(x), data<T>(weight), data<Scalar>(mean),
                                        data<Scalar>(rstd), data<T>(dx), data<T>(dweight), data<T>(dbias), rstd.numel(),
                                        C});
  });
  return {dx, dweight, dbias};
}

TORCH_LIBRARY_FRAGMENT(warploom_cpu, m) {
  m.def(
      "layer_norm_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float eps) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "layer_norm_bwd(Tensor dy, Tensor? dstream, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> "
      "(Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(warploom_cpu, CPU, m) {
  m.impl("layer_norm_fwd", layer_norm_fwd);
  m.impl("layer_norm_bwd", layer_norm_bwd);
}

}  // namespace
}  // namespace warploom::bindings
