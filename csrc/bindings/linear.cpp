#include "bindings/linear.h"

namespace warploom::bindings {
namespace {

using cpu::Activation;

Activation activation_of(c10::string_view name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "relu2") return Activation::kRelu2;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "silu") return Activation::kSilu;
  TORCH_CHECK_VALUE(false, "activation must be none, relu, relu2, gelu, gelu_tanh or silu, got ", name);
}

// Such as a GPT-2 model keeps its weights (Conv1D). The kernels read those as they lie.
bool is_transposed(const Tensor& weight) { return !weight.is_contiguous() && weight.t().is_contiguous(); }

std::tuple<Tensor, Tensor> linear_fwd(const Tensor& x_any, const Tensor& weight_any, const OptionalTensor& bias_any,
                                      const OptionalTensor& packed, c10::string_view activation, bool need_h) {
  check_parameter("weight", weight_any, x_any);
  const int64_t C = x_any.size(-1), F = weight_any.size(0);
  check("bias", bias_any, {F}, weight_any.scalar_type());
  const bool transposed = is_transposed(weight_any);
  const Tensor x = x_any.contiguous(), weight = transposed ? weight_any : weight_any.contiguous();
  const OptionalTensor bias = contiguous(bias_any);

  Tensor y = at::empty(output_shape(x, F), x.options());
  Tensor h = need_h ? at::empty_like(y) : at::empty({0}, x.options());
  switch_parameter(cpu::linear(), x, weight, [&](const auto& kernels, auto x_element, auto weight_element) {
    using T = decltype(x_element);
    using W = decltype(weight_element);
    kernels.fwd({data<T>(x), data<W>(weight), data<W>(bias), checked_packed(packed, weight, x), data<T>(y),
                 need_h ? data<T>(h) : nullptr, activation_of(activation), num_rows(x), C, F, transposed});
  });
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor> linear_bwd(const Tensor& dy_any, const Tensor& x_any, const Tensor& weight_any,
                                              const OptionalTensor& packed, const Tensor& saved_any,
                                              c10::string_view activation, bool need_dx, bool need_dweight,
                                              bool need_dbias) {
  check_parameter("weight", weight_any, x_any);
  const int64_t C = x_any.size(-1), F = weight_any.size(0);
  const auto kind = activation_of(activation);
  check("dy", dy_any, output_shape(x_any, F), x_any.scalar_type());
  if (kind != Activation::kNone) check("saved", saved_any, output_shape(x_any, F), x_any.scalar_type());
  TORCH_CHECK_VALUE(need_dweight || !need_dbias, "need_dbias needs need_dweight");
  const bool transposed = is_transposed(weight_any);
  const Tensor dy = dy_any.contiguous(), x = x_any.contiguous();
  const Tensor weight = transposed ? weight_any : weight_any.contiguous();
  const Tensor saved = saved_any.contiguous();

  const auto empty_if = [](bool wanted, at::IntArrayRef shape, const Tensor& like) {
    return wanted ? at::empty(shape, like.options()) : at::empty({0}, like.options());
  };
  Tensor dx = empty_if(need_dx, x.sizes(), x);
  Tensor dweight = transposed && need_dweight ? at::empty({C, F}, weight.options()).t()
                                              : empty_if(need_dweight, weight.sizes(), weight);
  Tensor dbias = empty_if(need_dbias, {F}, weight);
  switch_parameter(cpu::linear(), x, weight, [&](const auto& kernels, auto x_element, auto weight_element) {
    using T = decltype(x_element);
    using W = decltype(weight_element);
    kernels.bwd({data<T>(dy), data<T>(x), data<W>(weight), checked_packed(packed, weight, x), data<T>(saved),
                 need_dx ? data<T>(dx) : nullptr, need_dweight ? data<W>(dweight) : nullptr,
                 need_dbias ? data<W>(dbias) : nullptr, kind, num_rows(x), C, F, transposed});
  });
  return {dx, dweight, dbias};
}

// The size of what linear_pack fills, in bytes.
int64_t linear_packed_bytes(const Tensor& weight, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight must be (F, C), got ", weight.sizes());
  return packed_bytes(weight, dtype);
}

void linear_pack(const Tensor& weight_any, at::ScalarType dtype, Tensor packed) {
  const Tensor x = at::empty({0, weight_any.size(1)}, weight_any.options().dtype(dtype));
  check_parameter("weight", weight_any, x);
  check_packed(packed, weight_any, dtype);
  const Tensor weight = weight_any.contiguous();
  switch_parameter(cpu::linear(), x, weight, [&](const auto& kernels, auto, auto weight_element) {
    kernels.pack(data<decltype(weight_element)>(weight), weight.size(0), weight.size(1), packed.mutable_data_ptr());
  });
}

TORCH_LIBRARY_FRAGMENT(warploom_cpu, m) {
  m.def(
      "linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? packed, str activation, bool need_h) "
      "-> (Tensor, Tensor)");
  m.def(
      "linear_bwd(Tensor dy, Tensor x, Tensor weight, Tensor? packed, Tensor saved, str activation, bool need_dx, "
      "bool need_dweight, bool need_dbias) -> (Tensor, Tensor, Tensor)");
  m.def("linear_packed_bytes(Tensor weight, ScalarType dtype) -> int");
  m.def("linear_pack(Tensor weight, ScalarType dtype, Tensor(a!) packed) -> ()");
}

TORCH_LIBRARY_IMPL(warploom_cpu, CPU, m) {
  m.impl("linear_fwd", linear_fwd);
  m.impl("linear_bwd", linear_bwd);
  m.impl("linear_packed_bytes", linear_packed_bytes);
  m.impl("linear_pack", linear_pack);
}

}  // namespace
}  // namespace warploom::bindings
