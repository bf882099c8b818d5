// Every tensor shaped like q, k or v that is returned here is laid out as a contiguous (B, T, H, D), seen transposed as
// (B, H, T, D): the projections around attention read and write that. The fakes of
// engine/warploom/ops/_attention_reference.py say the same.
#include "cpu/attention.h"

#include <ATen/ops/zeros.h>

#include <algorithm>
#include <optional>
#include <thread>
#include <vector>

#include "bindings/binding.h"

namespace warploom::bindings {
namespace {

template <class T>
cpu::HeadsOf<const T> heads(const Tensor& tensor) {
  return {data<T>(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}
template <class T>
cpu::HeadsOf<T> heads(Tensor& tensor) {
  return {data<T>(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// The kernels walk rows of D; any other stride is free.
Tensor with_dense_rows(const Tensor& tensor) { return tensor.stride(-1) == 1 ? tensor : tensor.contiguous(); }

Tensor empty_transposed(const Tensor& like) {
  return at::empty({like.size(0), like.size(2), like.size(1), like.size(3)}, like.options()).transpose(1, 2);
}

std::vector<int64_t> integers(const Tensor& tensor) {
  const Tensor wide = tensor.to(at::kLong).contiguous();
  const int64_t* first = data<int64_t>(wide);
  return {first, first + wide.numel()};
}

std::vector<int64_t> offsets(const char* name, const Tensor& tensor, int64_t end) {
  const std::vector<int64_t> found = integers(tensor);
  bool rises = found.size() >= 2 && found.front() == 0 && found.back() == end;
  for (size_t i = 0; i + 1 < found.size(); ++i) rises &= found[i] <= found[i + 1];
  TORCH_CHECK_VALUE(rises, name, " must rise from 0 to ", end, ", got ", at::IntArrayRef(found));
  return found;
}

// What decides which query sees which key.
struct Mask {
  const OptionalTensor &cu_seqlens, &cu_seqlens_k, &key_lengths;
  bool causal;
  std::optional<int64_t> window;
};

// Of two diagonals around the one on which the last query meets the last key, or of that one and one before it.
cpu::AttentionSequence sequence(int64_t b, int64_t first_query, int64_t num_queries, int64_t first_key,
                                int64_t num_keys, int64_t seen_keys, const Mask& mask) {
  const int64_t shift = num_keys - num_queries, all = num_queries + num_keys;
  const int64_t window = std::min(mask.window.value_or(all), all);
  return {b,        first_query, num_queries,        first_key,
          num_keys, seen_keys,   shift - window + 1, mask.causal ? shift : shift + window - 1};
}

// One sequence per batch entry, or per packed document.
std::vector<cpu::AttentionSequence> sequences(const Tensor& q, const Tensor& k, const Mask& mask) {
  const int64_t B = q.size(0), T = q.size(2), S = k.size(2);
  TORCH_CHECK_VALUE(mask.window.value_or(1) >= 1, "window must be at least 1, got ", mask.window.value_or(1));
  std::vector<cpu::AttentionSequence> found;
  if (mask.cu_seqlens.has_value()) {
    TORCH_CHECK_VALUE(!mask.key_lengths.has_value(), "cu_seqlens and key_lengths exclude each other, got both");
    TORCH_CHECK_VALUE(B == 1, "cu_seqlens needs B == 1, got B = ", B);
    const auto queries = offsets("cu_seqlens", *mask.cu_seqlens, T);
    const auto keys = mask.cu_seqlens_k.has_value() ? offsets("cu_seqlens_k", *mask.cu_seqlens_k, S)
                                                    : offsets("cu_seqlens", *mask.cu_seqlens, S);
    TORCH_CHECK_VALUE(queries.size() == keys.size(), "cu_seqlens_k must have ", queries.size(),
                      " offsets as cu_seqlens has, got ", keys.size());
    for (size_t i = 0; i + 1 < queries.size(); ++i) {
      const int64_t num_keys = keys[i + 1] - keys[i];
      found.push_back(sequence(0, queries[i], queries[i + 1] - queries[i], keys[i], num_keys, num_keys, mask));
    }
    return found;
  }
  TORCH_CHECK_VALUE(!mask.cu_seqlens_k.has_value(), "cu_seqlens_k needs cu_seqlens, got none");
  std::vector<int64_t> lengths(B, S);
  if (mask.key_lengths.has_value()) {
    lengths = integers(*mask.key_lengths);
    TORCH_CHECK_VALUE(static_cast<int64_t>(lengths.size()) == B, "key_lengths must be (", B, ",), got ",
                      mask.key_lengths->sizes());
  }
  for (int64_t b = 0; b < B; ++b) {
    TORCH_CHECK_VALUE(0 <= lengths[b] && lengths[b] <= S, "key_lengths must be in [0, ", S, "], got ", lengths[b]);
    found.push_back(sequence(b, 0, T, 0, S, lengths[b], mask));
  }
  return found;
}

void check_operands(const Tensor& q, const Tensor& k, const Tensor& v) {
  TORCH_CHECK_VALUE(q.dim() == 4 && q.size(3) > 0, "q must be (B, H, T, D) with D at least 1, got ", q.sizes());
  TORCH_CHECK_VALUE(
      k.dim() == 4 && k.size(0) == q.size(0) && k.size(3) == q.size(3) && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
      "k must be (B, H_kv, S, D) with H_kv dividing H to match q ", q.sizes(), ", got ", k.sizes());
  check("k", k, k.sizes(), q.scalar_type());
  check("v", v, k.sizes(), q.scalar_type());
}

// The bias in q's type or float32, with dense rows; `kept` holds its memory.
cpu::AttentionBias bias_of(const OptionalTensor& bias, const Tensor& q,
                           const std::vector<cpu::AttentionSequence>& sequences, bool packed, Tensor& kept) {
  if (!bias.has_value()) return {};
  const bool by_distance = bias->dim() == 2;
  TORCH_CHECK_VALUE((by_distance || bias->dim() == 3) && (bias->size(0) == 1 || bias->size(0) == q.size(1)),
                    "bias must be (1 or ", q.size(1), ", T, S) or (1 or ", q.size(1), ", T + S - 1), got ",
                    bias->sizes());
  // By distance, distance 0 is in the middle for packed documents, and else where the first query meets the first key.
  const int64_t zero = !by_distance ? 0 : packed ? bias->size(1) / 2 : std::max<int64_t>(q.size(2) - 1, 0);
  for (const cpu::AttentionSequence& sequence : sequences) {
    const int64_t queries = sequence.num_queries, keys = sequence.num_keys;
    if (queries == 0 || keys == 0) continue;
    const bool covers = by_distance ? zero >= queries - 1 && bias->size(1) - zero >= keys
                                    : bias->size(1) >= queries && bias->size(2) >= keys;
    TORCH_CHECK_VALUE(covers, "bias must cover ", queries, " queries and ", keys, " keys, got ", bias->sizes());
  }
  TORCH_CHECK_TYPE(bias->scalar_type() == q.scalar_type() || bias->scalar_type() == at::kFloat, "bias must be ",
                   q.scalar_type(), " as q is or float32, got ", bias->scalar_type());
  kept = with_dense_rows(q.scalar_type() == at::kDouble ? bias->to(at::kDouble) : *bias);
  return {kept.const_data_ptr(),
          kept.scalar_type() == at::kFloat,
          kept.size(0),
          kept.stride(0),
          zero,
          by_distance ? -1 : kept.stride(1)};
}

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
                                         const OptionalTensor& bias_any, const OptionalTensor& cu_seqlens,
                                         const OptionalTensor& cu_seqlens_k, const OptionalTensor& key_lengths,
                                         bool causal, std::optional<int64_t> window, double softmax_scale) {
  check_operands(q_any, k_any, v_any);
  const Tensor q = with_dense_rows(q_any), k = with_dense_rows(k_any), v = with_dense_rows(v_any);
  const auto parts = sequences(q, k, {cu_seqlens, cu_seqlens_k, key_lengths, causal, window});
  Tensor kept;
  const cpu::AttentionBias bias = bias_of(bias_any, q, parts, cu_seqlens.has_value(), kept);
  const int64_t B = q.size(0), H = q.size(1), T = q.size(2), D = q.size(3);

  Tensor o = empty_transposed(q);
  Tensor lse = at::empty({B, H, T}, q.options().dtype(accumulator(q.scalar_type())));
  const cpu::AttentionProblem problem{
      H, k.size(1), T, D, parts.data(), static_cast<int64_t>(parts.size()), softmax_scale};
  switch_dtype(q, [&](auto element) {
    using E = decltype(element);
    using Scalar = typename Accumulator<E>::type;
    cpu::attention_fwd().get(element)(
        {problem, heads<E>(q), heads<E>(k), heads<E>(v), bias, heads<E>(o), data<Scalar>(lse)});
  });
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& do_any, const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, const Tensor& o_any,
    const Tensor& lse_any, const OptionalTensor& bias_any, const OptionalTensor& cu_seqlens,
    const OptionalTensor& cu_seqlens_k, const OptionalTensor& key_lengths, bool causal, std::optional<int64_t> window,
    double softmax_scale, bool need_dbias) {
  check_operands(q_any, k_any, v_any);
  check("do", do_any, q_any.sizes(), q_any.scalar_type());
  check("o", o_any, q_any.sizes(), q_any.scalar_type());
  check("lse", lse_any, q_any.sizes().slice(0, 3), accumulator(q_any.scalar_type()));
  TORCH_CHECK_VALUE(bias_any.has_value() || !need_dbias, "need_dbias must be False without a bias, got True");
  const Tensor q = with_dense_rows(q_any), k = with_dense_rows(k_any), v = with_dense_rows(v_any);
  const Tensor d_o = with_dense_rows(do_any), o = with_dense_rows(o_any), lse = lse_any.contiguous();
  const auto parts = sequences(q, k, {cu_seqlens, cu_seqlens_k, key_lengths, causal, window});
  Tensor kept;
  const cpu::AttentionBias bias = bias_of(bias_any, q, parts, cu_seqlens.has_value(), kept);
  const int64_t H = q.size(1), T = q.size(2), D = q.size(3);

  Tensor dq = empty_transposed(q), dk = empty_transposed(k), dv = empty_transposed(v);
  Tensor dbias = need_dbias ? at::empty(kept.sizes(), kept.options()) : at::empty({0}, q.options());
  const cpu::AttentionProblem problem{
      H, k.size(1), T, D, parts.data(), static_cast<int64_t>(parts.size()), softmax_scale};
  switch_dtype(q, [&](auto element) {
    using E = decltype(element);
    using Scalar = typename Accumulator<E>::type;
    cpu::attention_bwd().get(element)(
        {problem, heads<E>(d_o), heads<E>(q), heads<E>(k), heads<E>(v), heads<E>(o), data<Scalar>(lse), bias,
         heads<E>(dq), heads<E>(dk), heads<E>(dv), need_dbias ? dbias.mutable_data_ptr() : nullptr,
         need_dbias && !bias.by_distance() ? dbias.size(1) : 1, need_dbias ? dbias.size(-1) : 0,
         static_cast<int64_t>(std::thread::hardware_concurrency())});
  });
  return {dq, dk, dv, need_dbias ? dbias.to(bias_any->scalar_type()) : dbias};
}

TORCH_LIBRARY_FRAGMENT(warploom_cpu, m) {
  m.def(
      "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? cu_seqlens, Tensor? cu_seqlens_k, "
      "Tensor? key_lengths, bool causal, int? window, float softmax_scale) -> (Tensor, Tensor)");
  m.def(
      "attention_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? bias, Tensor? cu_seqlens, "
      "Tensor? cu_seqlens_k, Tensor? key_lengths, bool causal, int? window, float softmax_scale, bool need_dbias) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(warploom_cpu, CPU, m) {
  m.impl("attention_fwd", attention_fwd);
  m.impl("attention_bwd", attention_bwd);
}

}  // namespace
}  // namespace warploom::bindings
