#include "bindings/binding.h"
#include "bindings/stream.h"
#include "cuda/attention.h"

namespace warploom::bindings {
namespace {

// (B, H, T, D) with rows that are dense and begin at multiples of 16 bytes: as it lies, or else copied.
Tensor with_aligned_rows(const Tensor& tensor) {
  bool fits = tensor.stride(3) == 1 && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  for (int i = 0; i < 3; ++i) fits = fits && tensor.stride(i) % 8 == 0;
  return fits ? tensor : tensor.clone(at::MemoryFormat::Contiguous);
}

cuda::HeadStrides strides_of(const Tensor& tensor) { return {tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

// Like `tensor`, laid out so that its transpose(1, 2) is contiguous.
Tensor empty_transposed(const Tensor& tensor) {
  return at::empty({tensor.size(0), tensor.size(2), tensor.size(1), tensor.size(3)}, tensor.options()).transpose(1, 2);
}

void check_heads(const Tensor& q, const Tensor& k, const Tensor& v, double softmax_scale) {
  TORCH_CHECK_TYPE(q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf,
                   "q must be bfloat16 or float16, got ", q.scalar_type());
  TORCH_CHECK_VALUE(q.dim() == 4 && cuda::attention_takes(q.size(3)),
                    "q must be (B, H, T, D) with D 64, 96, 128 or 256, got ", q.sizes());
  TORCH_CHECK_VALUE(
      k.dim() == 4 && k.size(0) == q.size(0) && k.size(3) == q.size(3) && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
      "k must be (B, H_kv, S, D) with H_kv dividing H, got ", k.sizes());
  check("k", k, k.sizes(), q.scalar_type());
  check("v", v, k.sizes(), q.scalar_type());
  // Blocks of the second dimension of a grid.
  TORCH_CHECK_VALUE(q.size(0) * q.size(1) < 65536, "B * H must be below 65536, got ", q.size(0) * q.size(1));
  TORCH_CHECK_VALUE(q.size(2) < (1 << 30) && k.size(2) < (1 << 30), "T and S must be below 2^30");
  TORCH_CHECK_VALUE(softmax_scale > 0, "softmax_scale must be positive, got ", softmax_scale);
}

template <class T>
cuda::Attention<T> arguments_of(const Tensor& q, const Tensor& k, const Tensor& v, bool causal, double softmax_scale) {
  cuda::Attention<T> a = {};
  a.q = data<T>(q), a.k = data<T>(k), a.v = data<T>(v);
  a.q_at = strides_of(q), a.k_at = strides_of(k), a.v_at = strides_of(v);
  a.B = static_cast<int>(q.size(0)), a.H = static_cast<int>(q.size(1)), a.H_kv = static_cast<int>(k.size(1));
  a.length_q = static_cast<int>(q.size(2)), a.length_k = static_cast<int>(k.size(2)), a.D = static_cast<int>(q.size(3));
  a.causal = causal, a.softmax_scale = static_cast<float>(softmax_scale);
  return a;
}

template <class Body>
void switch_half_precision(const Tensor& q, Body&& body) {
  if (q.scalar_type() == at::kBFloat16) {
    body(bf16{});
  } else {
    body(fp16{});
  }
}

std::tuple<Tensor, Tensor> attention_fwd_cuda(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
                                              bool causal, double softmax_scale) {
  const CurrentStream stream(q_any);
  check_heads(q_any, k_any, v_any, softmax_scale);
  const Tensor q = with_aligned_rows(q_any), k = with_aligned_rows(k_any), v = with_aligned_rows(v_any);
  Tensor o = empty_transposed(q), lse = at::empty(q.sizes().slice(0, 3), q.options().dtype(at::kFloat));
  switch_half_precision(q, [&](auto element) {
    using T = decltype(element);
    cuda::Attention<T> a = arguments_of<T>(q, k, v, causal, softmax_scale);
    a.o = data<T>(o), a.o_at = strides_of(o), a.lse = data<float>(lse);
    cuda::launch_attention_fwd(a, stream.get());
  });
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd_cuda(const Tensor& dO_any, const Tensor& q_any, const Tensor& k_any,
                                                      const Tensor& v_any, const Tensor& o_any, const Tensor& lse_any,
                                                      bool causal, double softmax_scale) {
  const CurrentStream stream(q_any);
  check_heads(q_any, k_any, v_any, softmax_scale);
  check("do", dO_any, q_any.sizes(), q_any.scalar_type());
  check("o", o_any, q_any.sizes(), q_any.scalar_type());
  check("lse", lse_any, q_any.sizes().slice(0, 3), at::kFloat);
  const Tensor q = with_aligned_rows(q_any), k = with_aligned_rows(k_any), v = with_aligned_rows(v_any);
  Tensor dO = with_aligned_rows(dO_any), o = with_aligned_rows(o_any), lse = lse_any.contiguous();
  Tensor delta = at::empty_like(lse), dq = empty_transposed(q), dk = empty_transposed(k), dv = empty_transposed(v);
  switch_half_precision(q, [&](auto element) {
    using T = decltype(element);
    cuda::Attention<T> a = arguments_of<T>(q, k, v, causal, softmax_scale);
    a.o = data<T>(o), a.o_at = strides_of(o), a.dO = data<T>(dO), a.dO_at = strides_of(dO);
    a.lse = data<float>(lse), a.delta = data<float>(delta);
    a.dq = data<T>(dq), a.dk = data<T>(dk), a.dv = data<T>(dv);
    a.dq_at = strides_of(dq), a.dk_at = strides_of(dk), a.dv_at = strides_of(dv);
    cuda::launch_attention_bwd(a, stream.get());
  });
  return {dq, dk, dv};
}

TORCH_LIBRARY_FRAGMENT(warploom_cuda, m) {
  m.def("attention_fwd(Tensor q, Tensor k, Tensor v, bool causal, float softmax_scale) -> (Tensor, Tensor)",
        attention_fwd_cuda);
  m.def(
      "attention_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, bool causal, float softmax_scale) "
      "-> (Tensor, Tensor, Tensor)",
      attention_bwd_cuda);
}

}  // namespace
}  // namespace warploom::bindings
