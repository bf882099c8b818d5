#include "bindings/binding.h"
#include "bindings/stream.h"
#include "cuda/layer_norm.h"

namespace warploom::bindings {
namespace {

template <class T>
int checked_width(int64_t C) {
  TORCH_CHECK_VALUE(C <= cuda::max_norm_width<T>(), "x must have rows of at most ", cuda::max_norm_width<T>(),
                    " elements, got ", C);
  return static_cast<int>(C);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_fwd_cuda(const Tensor& x_any, const Tensor& weight_any,
                                                               const OptionalTensor& bias_any,
                                                               const OptionalTensor& residual_any, double eps) {
  const CurrentStream stream(x_any);
  const int64_t C = x_any.size(-1);
  check("weight", weight_any, {C}, x_any.scalar_type());
  check("bias", bias_any, {C}, x_any.scalar_type());
  check("residual", residual_any, x_any.sizes(), x_any.scalar_type());
  const Tensor x = x_any.contiguous(), weight = weight_any.contiguous();
  const OptionalTensor bias = contiguous(bias_any), residual = contiguous(residual_any);

  Tensor y = at::empty_like(x);
  Tensor sum = residual.has_value() ? at::empty_like(x) : at::empty({0}, x.options());
  Tensor mean = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::kFloat));
  Tensor rstd = at::empty_like(mean);
  switch_gpu_dtype(x, [&](auto element) {
    using T = decltype(element);
    cuda::launch_layer_norm_fwd<T>(
        {data<T>(x), data<T>(residual), data<T>(weight), data<T>(bias), data<T>(y), data<T>(sum), data<float>(mean),
         data<float>(rstd), rstd.numel(), checked_width<T>(C), static_cast<float>(eps)},
        stream.get());
  });
  return {y, sum, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd_cuda(const Tensor& dy_any, const OptionalTensor& dstream_any,
                                                       const Tensor& x_any, const Tensor& weight_any,
                                                       const Tensor& mean_any, const Tensor& rstd_any) {
  const CurrentStream stream(x_any);
  const int64_t C = x_any.size(-1);
  const auto dtype = x_any.scalar_type();
  const auto rows = x_any.sizes().slice(0, x_any.dim() - 1);
  check("dy", dy_any, x_any.sizes(), dtype);
  check("dstream", dstream_any, x_any.sizes(), dtype);
  check("weight", weight_any, {C}, dtype);
  check("mean", mean_any, rows, at::kFloat);
  check("rstd", rstd_any, rows, at::kFloat);
  const Tensor dy = dy_any.contiguous(), x = x_any.contiguous(), weight = weight_any.contiguous();
  const Tensor mean = mean_any.contiguous(), rstd = rstd_any.contiguous();
  const OptionalTensor dstream = contiguous(dstream_any);

  Tensor dx = at::empty_like(x), dweight = at::empty_like(weight), dbias = at::empty_like(weight);
  switch_gpu_dtype(x, [&](auto element) {
    using T = decltype(element);
    const int width = checked_width<T>(C), num_partials = cuda::layer_norm_num_partials<T>(rstd.numel(), width);
    Tensor partials = at::empty({num_partials, 2, C}, rstd.options());
    cuda::launch_layer_norm_bwd<T>(
        {data<T>(dy), data<T>(dstream), data<T>(x), data<T>(weight), data<float>(mean), data<float>(rstd), data<T>(dx),
         data<T>(dweight), data<T>(dbias), data<float>(partials), num_partials, rstd.numel(), width},
        stream.get());
  });
  return {dx, dweight, dbias};
}

TORCH_LIBRARY_FRAGMENT(warploom_cuda, m) {
  m.def(
      "layer_norm_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float eps) -> "
      "(Tensor, Tensor, Tensor, Tensor)",
      layer_norm_fwd_cuda);
  m.def(
      "layer_norm_bwd(Tensor dy, Tensor? dstream, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> "
      "(Tensor, Tensor, Tensor)",
      layer_norm_bwd_cuda);
}

}  // namespace
}  // namespace warploom::bindings
