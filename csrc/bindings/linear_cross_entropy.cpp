#include "cpu/linear_cross_entropy.h"

#include <cstring>

#include "bindings/binding.h"

namespace warploom::bindings {
namespace {

// The arguments that forward and backward share, checked and contiguous.
struct Inputs {
  Tensor hidden, weight, targets;
  int64_t N, C, V, ignore_index, count = 0;  // count: of the rows that are not ignored

  Inputs(const Tensor& hidden_any, const Tensor& weight_any, const Tensor& targets_any, int64_t ignore_index,
         bool sharded)
      : hidden(hidden_any.contiguous()),
        weight(weight_any.contiguous()),
        targets(targets_any.contiguous()),
        C(weight_any.size(1)),
        V(weight_any.size(0)),
        ignore_index(ignore_index) {
    check_parameter("weight", weight, hidden);
    check("hidden", hidden, shape_with(targets, C), hidden.scalar_type());
    check("targets", targets, targets.sizes(), at::kLong);
    N = targets.numel();
    const int64_t* target = data<int64_t>(std::as_const(targets));
    for (int64_t n = 0; n < N; ++n) {
      TORCH_CHECK_VALUE(target[n] == ignore_index || (target[n] >= 0 && target[n] < V + sharded),
                        "targets must be in [0, ", V, "), got ", target[n]);
      count += target[n] != ignore_index;
    }
    if (count < N) clear_ignored_rows();
  }

  template <class Body>
  void switch_kernels(Body&& body) const {
    switch_parameter(cpu::linear_cross_entropy(), hidden, weight, body);
  }

 private:
  static std::vector<int64_t> shape_with(const Tensor& targets, int64_t C) {
    auto shape = targets.sizes().vec();
    shape.push_back(C);
    return shape;
  }

  // Padding may hold anything, NaN too, and 0 * NaN would reach the gradient of the weight.
  void clear_ignored_rows() {
    hidden = hidden.clone();
    const int64_t* target = data<int64_t>(std::as_const(targets));
    auto* bytes = static_cast<char*>(hidden.mutable_data_ptr());
    const size_t row_bytes = static_cast<size_t>(C) * hidden.element_size();
    for (int64_t n = 0; n < N; ++n) {
      if (target[n] == ignore_index) std::memset(bytes + n * row_bytes, 0, row_bytes);
    }
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_fwd(const Tensor& hidden, const Tensor& weight,
                                                                            const Tensor& targets, int64_t ignore_index,
                                                                            bool need_dhidden, bool need_dweight,
                                                                            bool sharded) {
  TORCH_CHECK_VALUE(!sharded || (!need_dhidden && !need_dweight), "the gradients of a shard are made by the backward");
  const Inputs in(hidden, weight, targets, ignore_index, sharded);
  const auto stats = hidden.options().dtype(accumulator(hidden.scalar_type()));
  Tensor lse = at::empty({in.N}, stats);
  Tensor dhidden = at::empty(need_dhidden ? hidden.sizes() : at::IntArrayRef{0}, hidden.options());
  Tensor dweight = at::empty(need_dweight ? weight.sizes() : at::IntArrayRef{0}, weight.options());
  double loss = 0;
  in.switch_kernels([&](const auto& kernels, auto element, auto weight_element) {
    using T = decltype(element);
    using W = decltype(weight_element);
    kernels.fwd({data<T>(in.hidden), data<W>(in.weight), data<int64_t>(in.targets), in.ignore_index,
                 data<typename Accumulator<T>::type>(lse), &loss, need_dhidden ? data<T>(dhidden) : nullptr,
                 need_dweight ? data<W>(dweight) : nullptr, in.N, in.C, in.V});
  });
  if (need_dhidden || need_dweight) lse = at::empty({0}, stats);  // kept for a backward that makes the gradients
  return {at::full({}, loss, stats), at::full({}, in.count, stats), lse, dhidden, dweight};
}

std::tuple<Tensor, Tensor> linear_cross_entropy_bwd(const Tensor& scale, const Tensor& hidden, const Tensor& weight,
                                                    const Tensor& targets, const Tensor& lse, int64_t ignore_index,
                                                    bool need_dhidden, bool need_dweight, bool sharded) {
  const Inputs in(hidden, weight, targets, ignore_index, sharded);
  check("lse", lse, {in.N}, accumulator(hidden.scalar_type()));
  TORCH_CHECK_VALUE(scale.numel() == 1, "scale must hold one number, got shape ", scale.sizes());
  Tensor dhidden = need_dhidden ? at::empty(hidden.sizes(), hidden.options()) : at::empty({0}, hidden.options());
  Tensor dweight = need_dweight ? at::empty(weight.sizes(), weight.options()) : at::empty({0}, weight.options());
  in.switch_kernels([&](const auto& kernels, auto element, auto weight_element) {
    using T = decltype(element);
    using W = decltype(weight_element);
    kernels.bwd({data<T>(in.hidden), data<W>(in.weight), data<int64_t>(in.targets), in.ignore_index,
                 data<typename Accumulator<T>::type>(lse), scale.item().toDouble(),
                 need_dhidden ? data<T>(dhidden) : nullptr, need_dweight ? data<W>(dweight) : nullptr, in.N, in.C,
                 in.V});
  });
  return {dhidden, dweight};
}

TORCH_LIBRARY_FRAGMENT(warploom_cpu, m) {
  m.def(
      "linear_cross_entropy_fwd(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, bool need_dhidden, "
      "bool need_dweight, bool sharded=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_cross_entropy_bwd(Tensor scale, Tensor hidden, Tensor weight, Tensor targets, Tensor lse, "
      "int ignore_index, bool need_dhidden, bool need_dweight, bool sharded=False) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(warploom_cpu, CPU, m) {
  m.impl("linear_cross_entropy_fwd", linear_cross_entropy_fwd);
  m.impl("linear_cross_entropy_bwd", linear_cross_entropy_bwd);
}

}  // namespace
}  // namespace warploom::bindings
