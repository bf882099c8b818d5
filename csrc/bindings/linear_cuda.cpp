#include "bindings/binding.h"
#include "bindings/stream.h"
#include "cuda/cublaslt.h"
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

Tensor empty_if(bool needed, at::IntArrayRef shape, const Tensor& like) {
  return at::empty(needed ? shape : at::IntArrayRef{0}, like.options());
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
  Tensor mask = relu ? aligned(mask_any) : mask_any;
  Tensor dx = empty_if(need_dx, x.sizes(), x), dweight = empty_if(need_dweight, weight_any.sizes(), weight_any);
  Tensor dbias = empty_if(need_dbias, {F}, weight_any);
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

// The same by cuBLASLt. Its matrices are column-major: a row-major (N, F) is its (F, N).

namespace lt = cuda::cublaslt;

lt::Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kBFloat16:
      return lt::Type::kBFloat16;
    case at::kHalf:
      return lt::Type::kHalf;
    default:
      return lt::Type::kFloat;
  }
}

// y = x weight^T: y^T = weight x^T.
lt::Product forward_product(Shape s, lt::Type type, bool has_bias, bool relu, bool need_mask) {
  const auto epilogue = !relu       ? (has_bias ? lt::Epilogue::kBias : lt::Epilogue::kNone)
                        : need_mask ? (has_bias ? lt::Epilogue::kReluMaskBias : lt::Epilogue::kReluMask)
                                    : (has_bias ? lt::Epilogue::kReluBias : lt::Epilogue::kRelu);
  return {.m = s.F,
          .n = s.N,
          .k = s.C,
          .transpose_a = true,
          .type = type,
          .d_type = type,
          .epilogue = epilogue,
          .mask_bits = relu && need_mask ? 32 * cuda::mask_words(s.F) : 0};
}

// dx = dh weight: dx^T = weight^T dh^T.
lt::Product input_product(Shape s, lt::Type type) {
  return {.m = s.C, .n = s.N, .k = s.F, .type = type, .d_type = type};
}

// dweight = dh^T x: dweight^T = x^T dh, and the sums of dh over its rows.
lt::Product weight_product(Shape s, lt::Type type, lt::Type result_type, bool need_dbias) {
  const auto epilogue = need_dbias ? lt::Epilogue::kSumOfB : lt::Epilogue::kNone;
  return {.m = s.C, .n = s.F, .k = s.N, .transpose_b = true, .type = type, .d_type = result_type, .epilogue = epilogue};
}

int index_of_device(const Tensor& tensor) { return tensor.is_cpu() ? 0 : tensor.get_device(); }

void run_product(const lt::Product& product, const Tensor& on, Stream stream) {
  const std::optional<lt::Plan> plan = lt::plan(product, index_of_device(on));
  TORCH_CHECK(plan.has_value(), "cuBLASLt has no kernel for this product of ", on.scalar_type(), ": m ", product.m,
              ", n ", product.n, ", k ", product.k, ", epilogue ", static_cast<int>(product.epilogue));
  const Tensor workspace = at::empty({static_cast<int64_t>(plan->workspace_bytes)}, on.options().dtype(at::kByte));
  lt::run(product, *plan, index_of_device(on), workspace.mutable_data_ptr(), stream);
}

// Whether the library has kernels for all products of a call.
bool linear_cublaslt_runs(const Tensor& x, const Tensor& weight, bool has_bias, c10::string_view activation,
                          bool need_mask, bool backward) {
  const CurrentStream stream(x);
  const Shape shape = checked_shape(x, weight);
  if (shape.N == 0) return true;  // nothing is asked of it
  const auto runs = [&](const lt::Product& product) { return lt::plan(product, index_of_device(x)).has_value(); };
  if (!backward) return runs(forward_product(shape, type_of(x), has_bias, checked_relu(activation), need_mask));
  return runs(input_product(shape, type_of(x))) && runs(weight_product(shape, type_of(x), type_of(weight), has_bias));
}

std::tuple<Tensor, Tensor> linear_fwd_cublaslt(const Tensor& x_any, const Tensor& weight_any,
                                               const OptionalTensor& bias_any, const OptionalTensor& panels,
                                               c10::string_view activation, bool need_mask) {
  const CurrentStream stream(x_any);
  const Shape shape = checked_shape(x_any, weight_any);
  const bool relu = checked_relu(activation);
  check("bias", bias_any, {shape.F}, weight_any.scalar_type());
  Tensor y = at::empty(with_last(x_any, shape.F), x_any.options());
  Tensor mask = at::empty({0}, x_any.options());
  if (relu && need_mask) {
    mask = at::empty(with_last(x_any, 4 * cuda::mask_words(shape.F)), x_any.options().dtype(at::kByte));
  }
  if (shape.N == 0) return {y, mask};
  const Tensor x = aligned(x_any), weight = narrow_weight(weight_any, panels, x);
  lt::Product product = forward_product(shape, type_of(x), bias_any.has_value(), relu, need_mask);
  product.a = weight.const_data_ptr(), product.b = x.const_data_ptr(), product.d = y.mutable_data_ptr();
  Tensor bias;
  if (bias_any.has_value()) {
    bias = aligned(bias_any->to(x.scalar_type()));
    product.bias = bias.mutable_data_ptr();
  }
  if (relu && need_mask) product.mask = mask.mutable_data_ptr();
  run_product(product, x, stream.get());
  return {y, mask};
}

std::tuple<Tensor, Tensor, Tensor> linear_bwd_cublaslt(const Tensor& dy_any, const Tensor& x_any,
                                                       const Tensor& weight_any, const OptionalTensor& panels,
                                                       const Tensor& mask, c10::string_view activation, bool need_dx,
                                                       bool need_dweight, bool need_dbias) {
  const CurrentStream stream(x_any);
  const Shape shape = checked_shape(x_any, weight_any);
  const bool relu = checked_relu(activation);
  check("dy", dy_any, with_last(x_any, shape.F), x_any.scalar_type());
  if (relu) check("mask", mask, with_last(x_any, 4 * cuda::mask_words(shape.F)), at::kByte);
  const Tensor x = aligned(x_any);
  Tensor dx = empty_if(need_dx, x.sizes(), x), dweight = empty_if(need_dweight, weight_any.sizes(), weight_any);
  Tensor dbias = empty_if(need_dbias, {shape.F}, weight_any);
  if (shape.N == 0) return {dx, dweight.zero_(), dbias.zero_()};
  Tensor dh = aligned(dy_any);
  if (relu) {
    const Tensor dy = dh, bits = aligned(mask);
    dh = at::empty(dy.sizes(), dy.options());
    switch_half(x, [&](auto element) {
      using T = decltype(element);
      cuda::launch_linear_mask<T>(data<T>(dy), data<uint32_t>(bits), data<T>(dh), shape.N, shape.F, stream.get());
    });
  }
  if (need_dx) {
    const Tensor weight = narrow_weight(weight_any, panels, x);
    lt::Product product = input_product(shape, type_of(x));
    product.a = weight.const_data_ptr(), product.b = dh.const_data_ptr(), product.d = dx.mutable_data_ptr();
    run_product(product, x, stream.get());
  }
  if (need_dweight) {
    lt::Product product = weight_product(shape, type_of(x), type_of(weight_any), need_dbias);
    product.a = x.const_data_ptr(), product.b = dh.const_data_ptr(), product.d = dweight.mutable_data_ptr();
    if (need_dbias) product.bias = dbias.mutable_data_ptr();
    run_product(product, x, stream.get());
  }
  return {dx, dweight, dbias};
}

int64_t cublaslt_load(c10::string_view library) { return lt::load(std::string(library)); }

TORCH_LIBRARY_FRAGMENT(warploom_cuda, m) {
  m.def(
      "linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? panels, str activation, bool need_mask) -> "
      "(Tensor, Tensor)",
      linear_fwd_cuda);
  m.def(
      "linear_bwd(Tensor dy, Tensor x, Tensor weight, Tensor? panels, Tensor mask, str activation, bool need_dx, "
      "bool need_dweight, bool need_dbias) -> (Tensor, Tensor, Tensor)",
      linear_bwd_cuda);
  m.def("cublaslt_load(str library) -> int", cublaslt_load);
  m.def(
      "linear_cublaslt_runs(Tensor x, Tensor weight, bool has_bias, str activation, bool need_mask, bool backward) -> "
      "bool",
      linear_cublaslt_runs);
  m.def(
      "linear_fwd_cublaslt(Tensor x, Tensor weight, Tensor? bias, Tensor? panels, str activation, bool need_mask) -> "
      "(Tensor, Tensor)",
      linear_fwd_cublaslt);
  m.def(
      "linear_bwd_cublaslt(Tensor dy, Tensor x, Tensor weight, Tensor? panels, Tensor mask, str activation, bool "
      "need_dx, bool need_dweight, bool need_dbias) -> (Tensor, Tensor, Tensor)",
      linear_bwd_cublaslt);
}

}  // namespace
}  // namespace warploom::bindings
