#include "bindings/binding.h"
#include "bindings/stream.h"
#include "cuda/linear.h"

namespace warploom::bindings {
namespace {

using cuda::LinearProduct;

// Dense, from a multiple of 16 bytes on.
Tensor aligned(const Tensor& tensor) {
  const Tensor dense = tensor.contiguous();
  return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0 ? dense : dense.clone();
}

struct Shape {
  int64_t N;
  int C, F;
};

Shape checked_shape(const Tensor& x, const Tensor& weight) {
  check_parameter("weight", weight, x);
  const int64_t C = x.size(-1), F = weight.size(0);
  TORCH_CHECK_TYPE(x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf,
                   "x must be bfloat16 or float16, got ", x.scalar_type());
  TORCH_CHECK_VALUE(C > 0 && F > 0 && C % 8 == 0 && F % 8 == 0 && C < (1 << 30) && F < (1 << 30),
                    "weight must be (F, C) of multiples of 8, got ", weight.sizes());
  return {rows(x), static_cast<int>(C), static_cast<int>(F)};
}

// The weight in x's dtype: as PackedWeight kept it, or converted now.
Tensor narrow_weight(const Tensor& weight, const OptionalTensor& panels, const Tensor& x) {
  if (!panels.has_value()) return aligned(weight.to(x.scalar_type()));
  check("panels", *panels, weight.sizes(), x.scalar_type());
  return aligned(*panels);
}

bool checked_relu(c10::string_view activation) {
  TORCH_CHECK_VALUE(activation == "relu" || activation == "none", "activation must be none or relu, got ", activation);
  return activation == "relu";
}

template <class Body>
void switch_half(const Tensor& x, Body&& body) {
  if (x.scalar_type() == at::kBFloat16) {
    body(bf16{});
  } else {
    body(fp16{});
  }
}

std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = last;
  return shape;
}

std::tuple<Tensor, Tensor> linear_fwd_cuda(const Tensor& x_any, const Tensor& weight_any,
                                           const OptionalTensor& bias_any, const OptionalTensor& panels,
                                           c10::string_view activation, bool need_mask) {
  const CurrentStream stream(x_any);
  const auto [N, C, F] = checked_shape(x_any, weight_any);
  const bool relu = checked_relu(activation);
  check("bias", bias_any, {F}, weight_any.scalar_type());
  const Tensor x = aligned(x_any), weight = narrow_weight(weight_any, panels, x);
  OptionalTensor bias;
  if (bias_any.has_value()) bias = aligned(bias_any->to(x.scalar_type()));
  Tensor y = at::empty(with_last(x, F), x.options());
  Tensor mask = relu && need_mask ? at::empty(with_last(x, 4 * cuda::mask_words(F)), x.options().dtype(at::kByte))
                                  : at::empty({0}, x.options());
  switch_half(x, [&, N = N, C = C, F = F](auto element) {
    using T = decltype(element);
    uint32_t* const bits = relu && need_mask ? data<uint32_t>(mask) : nullptr;
    cuda::launch_linear<T>(
        LinearProduct::kForward,
        {data<T>(x), data<T>(weight), data<T>(bias), nullptr, relu, bits, data<T>(y), false, nullptr, N, C, F},
        stream.get());
  });
  return {y, mask};
}

std::tuple<Tensor, Tensor, Tensor> linear_bwd_cuda(const Tensor& dy_any, const Tensor& x_any, const Tensor& weight_any,
                                                   const OptionalTensor& panels, const Tensor& mask_any,
                                                   c10::string_view activation, bool need_dx, bool need_dweight,
                                                   bool need_dbias) {
  const CurrentStream stream(x_any);
  const auto [N, C, F] = checked_shape(x_any, weight_any);
  const bool relu = checked_relu(activation);
  check("dy", dy_any, with_last(x_any, F), x_any.scalar_type());
  if (relu) check("mask", mask_any, with_last(x_any, 4 * cuda::mask_words(F)), at::kByte);
  const Tensor dy = aligned(dy_any), x = aligned(x_any);
  Tensor mask = relu ? mask_any.contiguous() : mask_any;
  const auto empty = [](bool needed, at::IntArrayRef shape, const Tensor& like) {
    return at::empty(needed ? shape : at::IntArrayRef{0}, like.options());
  };
  Tensor dx = empty(need_dx, x.sizes(), x), dweight = empty(need_dweight, weight_any.sizes(), weight_any);
  Tensor dbias = empty(need_dbias, {F}, weight_any);
  switch_half(x, [&, N = N, C = C, F = F](auto element) {
    using T = decltype(element);
    uint32_t* const bits = relu ? data<uint32_t>(mask) : nullptr;
    if (need_dx) {
      const Tensor weight = narrow_weight(weight_any, panels, x);
      cuda::launch_linear<T>(
          LinearProduct::kInput,
          {data<T>(x), data<T>(weight), nullptr, data<T>(dy), relu, bits, data<T>(dx), false, nullptr, N, C, F},
          stream.get());
    }
    if (need_dweight) {
      const bool is_float = weight_any.scalar_type() == at::kFloat;
      cuda::launch_linear<T>(LinearProduct::kWeight,
                             {data<T>(x), nullptr, nullptr, data<T>(dy), relu, bits, dweight.mutable_data_ptr(),
                              is_float, need_dbias ? dbias.mutable_data_ptr() : nullptr, N, C, F},
                             stream.get());
    }
  });
  return {dx, dweight, dbias};
}

TORCH_LIBRARY_FRAGMENT(warploom_cuda, m) {
  m.def(
      "linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? panels, str activation, bool need_mask) -> "
      "(Tensor, Tensor)",
      linear_fwd_cuda);
  m.def(
      "linear_bwd(Tensor dy, Tensor x, Tensor weight, Tensor? panels, Tensor mask, str activation, bool need_dx, "
      "bool need_dweight, bool need_dbias) -> (Tensor, Tensor, Tensor)",
      linear_bwd_cuda);
}

}  // namespace
}  // namespace warploom::bindings
