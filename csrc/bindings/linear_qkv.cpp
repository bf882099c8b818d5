#include "cpu/linear_qkv.h"

#include "bindings/linear.h"

namespace warploom::bindings {
namespace {

std::vector<Tensor> linear_qkv_fwd(const Tensor& x_any, const std::vector<Tensor>& weights_any,
                                   const c10::List<OptionalTensor>& biases, const c10::List<OptionalTensor>& panels) {
  TORCH_CHECK_VALUE(biases.size() == weights_any.size() && panels.size() == weights_any.size(),
                    "weights, biases and panels must be as many");
  const Tensor x = x_any.contiguous();
  std::vector<Tensor> outputs;
  for (size_t i = 0; i < weights_any.size(); ++i) {
    check_parameter("weight", weights_any[i], x);
    const Tensor weight = weights_any[i].contiguous();
    const int64_t C = x.size(-1), F = weight.size(0);
    const OptionalTensor bias_any = biases.get(i), packed = panels.get(i);
    check("bias", bias_any, {F}, weight.scalar_type());
    const OptionalTensor bias = contiguous(bias_any);
    Tensor y = at::empty(output_shape(x, F), x.options());
    switch_parameter(cpu::linear(), x, weight, [&](const auto& kernels, auto x_element, auto weight_element) {
      using T = decltype(x_element);
      using W = decltype(weight_element);
      kernels.fwd({data<T>(x), data<W>(weight), data<W>(bias), checked_packed(packed, weight, x), data<T>(y), nullptr,
                   cpu::Activation::kNone, num_rows(x), C, F});
    });
    outputs.push_back(y);
  }
  return outputs;
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> linear_qkv_bwd(
    const Tensor& x_any, const std::vector<Tensor>& dys_any, const std::vector<Tensor>& weights_any,
    const c10::List<OptionalTensor>& panels, bool need_dx, bool need_dweight, bool need_dbias) {
  const size_t count = weights_any.size();
  TORCH_CHECK_VALUE(count > 0 && dys_any.size() == count && panels.size() == count,
                    "dys, weights and panels must be as many, at least one");
  TORCH_CHECK_VALUE(need_dweight || !need_dbias, "need_dbias needs need_dweight");
  const Tensor x = x_any.contiguous();
  const int64_t C = x.size(-1);
  std::vector<Tensor> dys, weights, dweights, dbiases;
  for (size_t i = 0; i < count; ++i) {
    check_parameter("weight", weights_any[i], x);
    TORCH_CHECK_TYPE(weights_any[i].scalar_type() == weights_any[0].scalar_type(), "weights must have one dtype");
    const int64_t F = weights_any[i].size(0);
    check("dy", dys_any[i], output_shape(x, F), x.scalar_type());
    dys.push_back(dys_any[i].contiguous());
    weights.push_back(weights_any[i].contiguous());
    if (need_dweight) dweights.push_back(at::empty(weights[i].sizes(), weights[i].options()));
    if (need_dbias) dbiases.push_back(at::empty({F}, weights[i].options()));
  }
  Tensor dx = at::empty(need_dx ? x.sizes() : at::IntArrayRef{0}, x.options());
  switch_parameter(cpu::linear_qkv(), x, weights[0], [&](const auto& kernels, auto x_element, auto weight_element) {
    using T = decltype(x_element);
    using W = decltype(weight_element);
    std::vector<typename cpu::LinearsBackward<T, W>::Layer> layers;
    for (size_t i = 0; i < count; ++i) {
      layers.push_back({data<T>(std::as_const(dys[i])), data<W>(std::as_const(weights[i])),
                        checked_packed(panels.get(i), weights[i], x), need_dweight ? data<W>(dweights[i]) : nullptr,
                        need_dbias ? data<W>(dbiases[i]) : nullptr, weights[i].size(0)});
    }
    kernels.bwd({data<T>(x), need_dx ? data<T>(dx) : nullptr, layers.data(), static_cast<int>(count), num_rows(x), C});
  });
  return {dx, dweights, dbiases};
}

TORCH_LIBRARY_FRAGMENT(warploom_cpu, m) {
  m.def("linear_qkv_fwd(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor?[] panels) -> Tensor[]");
  m.def(
      "linear_qkv_bwd(Tensor x, Tensor[] dys, Tensor[] weights, Tensor?[] panels, bool need_dx, bool need_dweight, "
      "bool need_dbias) -> (Tensor, Tensor[], Tensor[])");
}

TORCH_LIBRARY_IMPL(warploom_cpu, CPU, m) {
  m.impl("linear_qkv_fwd", linear_qkv_fwd);
  m.impl("linear_qkv_bwd", linear_qkv_bwd);
}

}  // namespace
}  // namespace warploom::bindings
