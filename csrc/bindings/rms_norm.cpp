#include "cpu/rms_norm.h"

#include "bindings/binding.h"

namespace warploom::bindings {
namespace {

std::tuple<Tensor, Tensor, Tensor> rms_norm_fwd(const Tensor& x_any, const Tensor& weight_any,
                                                const OptionalTensor& residual_any, double eps) {
  const int64_t C = x_any.size(-1);
  check("weight", weight_any, {C}, x_any.scalar_type());
  check("residual", residual_any, x_any.sizes(), x_any.scalar_type());
  const Tensor x = x_any.contiguous(), weight = weight_any.contiguous();
  const OptionalTensor residual = contiguous(residual_any);

  Tensor y = at::empty_like(x);
  Tensor stream = residual.has_value() ? at::empty_like(x) : at::empty({0}, x.options());
  Tensor rstd = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(accumulator(x.scalar_type())));
  switch_dtype(x, [&](auto element) {
    using T = decltype(element);
    using Scalar = typename Accumulator<T>::type;
    cpu::rms_norm().get(element).fwd({data<T>(x), data<T>(residual), data<T>(weight), /*bias=*/nullptr, data<T>(y),
                                      data<T>(stream), /*mean=*/nullptr, data<Scalar>(rstd), rstd.numel(), C, eps});
  });
  return {y, stream, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy_any, const OptionalTensor& dstream_any, const Tensor& x_any,
                                        const Tensor& weight_any, const Tensor& rstd_any) {
  const int64_t C = x_any.size(-1);
  const auto dtype = x_any.scalar_type();
  check("dy", dy_any, x_any.sizes(), dtype);
  check("dstream", dstream_any, x_any.sizes(), dtype);
  check("weight", weight_any, {C}, dtype);
  check("rstd", rstd_any, x_any.sizes().slice(0, x_any.dim() - 1), accumulator(dtype));
  const Tensor dy = dy_any.contiguous(), x = x_any.contiguous(), weight = weight_any.contiguous();
  const Tensor rstd = rstd_any.contiguous();
  const OptionalTensor dstream = contiguous(dstream_any);

  Tensor dx = at::empty_like(x), dweight = at::empty_like(weight);
  switch_dtype(x, [&](auto element) {
    using T = decltype(element);
    using Scalar = typename Accumulator<T>::type;
    cpu::rms_norm().get(element).bwd({data<T>(dy), data<T>(dstream), data<T>(x), data<T>(weight), /*mean=*/nullptr,
                                      data<Scalar>(rstd), data<T>(dx), data<T>(dweight), /*dbias=*/nullptr,
                                      rstd.numel(), C});
  });
  return {dx, dweight};
}

TORCH_LIBRARY_FRAGMENT(warploom_cpu, m) {
  m.def("rms_norm_fwd(Tensor x, Tensor weight, Tensor? residual, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("rms_norm_bwd(Tensor dy, Tensor? dstream, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(warploom_cpu, CPU, m) {
  m.impl("rms_norm_fwd", rms_norm_fwd);
  m.impl("rms_norm_bwd", rms_norm_bwd);
}

}  // namespace
}  // namespace warploom::bindings
