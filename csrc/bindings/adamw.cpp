#include "cpu/adamw.h"

#include <cmath>

#include "bindings/adamw.h"
#include "bindings/linear.h"

namespace warploom::bindings {
namespace {

void check_panels(const AdamWLists& lists) {
  for (size_t i = 0; i < lists.packed.size(); ++i) {
    if (lists.packed[i].numel() == 0) continue;
    const Tensor& param = lists.params[i];
    TORCH_CHECK_VALUE(param.dim() == 2 && param.is_contiguous() && param.scalar_type() == at::kFloat, "params[", i,
                      "] must be a contiguous float32 matrix to be packed");
    check_packed(lists.packed[i], param, at::kBFloat16);
  }
}

template <class T, class Grad>
void step(cpu::AdamWStep<T, Grad> kernel, const AdamWLists& lists, double lr, const cpu::AdamWOptions& options) {
  std::vector<cpu::AdamWTensor<T, Grad>> work;
  DenseTensors tensors;
  work.reserve(lists.params.size());
  for (size_t i = 0; i < lists.params.size(); ++i) {
    const double step = advance(lists.state_steps[i]);
    const Tensor& param = lists.params[i];
    if (param.numel() == 0) continue;
    const bool is_dense = DenseTensors::are_dense(lists, i);
    const auto memory = [&](const Tensor& tensor) { return tensors.memory(tensor, is_dense); };
    work.push_back(
        {static_cast<T*>(memory(param)), static_cast<Grad*>(memory(lists.grads[i])),
         static_cast<T*>(memory(lists.exp_avgs[i])), static_cast<T*>(memory(lists.exp_avg_sqs[i])),
         lists.max_exp_avg_sqs.empty() ? nullptr : static_cast<T*>(memory(lists.max_exp_avg_sqs[i])), param.numel(),
         param.dim() == 2 && (!is_dense || param.is_contiguous()) ? param.size(1) : 1,
         lr / (1 - std::pow(options.beta1, step)), 1 / std::sqrt(1 - std::pow(options.beta2, step)),
         lists.packed.empty() || lists.packed[i].numel() == 0 ? nullptr : lists.packed[i].mutable_data_ptr()});
  }
  kernel(work.data(), static_cast<int64_t>(work.size()), options);
  tensors.write_back();
}

void adamw_step(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                at::TensorList max_exp_avg_sqs, at::TensorList state_steps, at::TensorList packed, double lr,
                double beta1, double beta2, double weight_decay, double eps, bool maximize, double grad_factor,
                bool clear_grads) {
  if (params.empty()) return;
  const AdamWLists lists = {params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, packed};
  check_lists(lists);
  check_panels(lists);
  // Negation is exact, so the sign can ride on the factor.
  const cpu::AdamWOptions options = {
      beta1, beta2, eps, 1 - lr * weight_decay, maximize ? -grad_factor : grad_factor, clear_grads};
  if (params[0].scalar_type() == grads[0].scalar_type()) {
    switch_dtype(params[0], [&](auto element) {
      using T = decltype(element);
      step<T, T>(cpu::adamw().get(element).step, lists, lr, options);
    });
  } else {
    step<float, bf16>(cpu::adamw().step_of_float_by_bf16, lists, lr, options);
  }
  // Autograd shall notice if it saved a parameter for a backward pass that is still to come.
  for (const Tensor& param : params) param.unsafeGetTensorImpl()->bump_version();
}

TORCH_LIBRARY_FRAGMENT(warploom_cpu, m) {
  m.def(
      "adamw_step(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
      "Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] state_steps, Tensor(g!)[] packed, float lr, float beta1, float "
      "beta2, "
      "float weight_decay, float eps, bool maximize, float grad_factor, bool clear_grads) -> ()");
}

TORCH_LIBRARY_IMPL(warploom_cpu, CPU, m) { m.impl("adamw_step", adamw_step); }

}  // namespace
}  // namespace warploom::bindings
