#include "cpu/cross_entropy.h"

#include "bindings/binding.h"

namespace warploom::bindings {
namespace {

// Returns the loss. The gradient goes into dlogits if that is defined; it may be logits.
Tensor run(const Tensor& logits, const Tensor& targets_any, int64_t ignore_index, bool mean, Tensor dlogits) {
  TORCH_CHECK_VALUE(logits.dim() > 0 && logits.size(-1) > 0, "logits must be (..., V), got ", logits.sizes());
  const int64_t V = logits.size(-1), N = rows(logits);
  check("targets", targets_any, logits.sizes().slice(0, logits.dim() - 1), at::kLong);
  const Tensor targets = targets_any.contiguous();
  const int64_t* target = data<int64_t>(targets);
  int64_t count = 0;
  for (int64_t n = 0; n < N; ++n) {
    TORCH_CHECK_VALUE(target[n] == ignore_index || (target[n] >= 0 && target[n] < V), "targets must be in [0, ", V,
                      "), got ", target[n]);
    count += target[n] != ignore_index;
  }
  double loss = 0;
  const double share = mean ? 1.0 / static_cast<double>(count) : 1.0;  // infinite if all rows are ignored: unused then
  switch_dtype(logits, [&](auto element) {
    using T = decltype(element);
    cpu::cross_entropy().get(element).fwd(
        {data<T>(logits), target, ignore_index, share, dlogits.defined() ? data<T>(dlogits) : nullptr, &loss, N, V});
  });
  return at::full({}, mean ? loss / static_cast<double>(count) : loss,
                  logits.options().dtype(accumulator(logits.scalar_type())));
}

std::tuple<Tensor, Tensor> cross_entropy_fwd(const Tensor& logits_any, const Tensor& targets, int64_t ignore_index,
                                             bool mean, bool need_dlogits) {
  const Tensor logits = logits_any.contiguous();
  if (!need_dlogits) return {run(logits, targets, ignore_index, mean, {}), at::empty({0}, logits.options())};
  const Tensor dlogits = at::empty_like(logits);
  return {run(logits, targets, ignore_index, mean, dlogits), dlogits};
}

Tensor cross_entropy_fwd_inplace(const Tensor& logits_any, const Tensor& targets, int64_t ignore_index, bool mean) {
  const Tensor logits = logits_any.contiguous();
  const Tensor loss = run(logits, targets, ignore_index, mean, logits);
  if (!logits.is_same(logits_any)) logits_any.copy_(logits);
  return loss;
}

TORCH_LIBRARY_FRAGMENT(warploom_cpu, m) {
  m.def(
      "cross_entropy_fwd(Tensor logits, Tensor targets, int ignore_index, bool mean, bool need_dlogits) -> "
      "(Tensor, Tensor)");
  m.def("cross_entropy_fwd_inplace(Tensor(a!) logits, Tensor targets, int ignore_index, bool mean) -> Tensor");
}

TORCH_LIBRARY_IMPL(warploom_cpu, CPU, m) {
  m.impl("cross_entropy_fwd", cross_entropy_fwd);
  m.impl("cross_entropy_fwd_inplace", cross_entropy_fwd_inplace);
}

}  // namespace
}  // namespace warploom::bindings
