#include "cpu/adamw.h"

#include <cmath>

#include "bindings/linear.h"

namespace warploom::bindings {
namespace {

struct Lists {
  at::TensorList params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, packed;
};

void check_lists(const Lists& lists) {
  const auto& params = lists.params;
  const auto dtype = params[0].scalar_type();
  TORCH_CHECK_TYPE(at::isFloatingType(dtype), "params must be floating point, got ", dtype);
  const auto check_list = [&](const char* name, at::TensorList list) {
    TORCH_CHECK_VALUE(list.size() == params.size(), name, " must hold ", params.size(), " tensors as params does, got ",
                      list.size());
  };
  const auto check_tensors = [&](const char* name, at::TensorList list, at::ScalarType expected) {
    check_list(name, list);
    for (size_t i = 0; i < list.size(); ++i) {
      TORCH_CHECK_VALUE(list[i].sizes() == params[i].sizes(), name, "[", i, "] must be ", params[i].sizes(),
                        " as params[", i, "] is, got ", list[i].sizes());
      TORCH_CHECK_TYPE(list[i].scalar_type() == expected, name, "[", i, "] must be ", expected, ", got ",
                       list[i].scalar_type());
    }
  };
  const bool narrow_grads =
      dtype == at::kFloat && !lists.grads.empty() && lists.grads[0].scalar_type() == at::kBFloat16;
  check_tensors("params", params, dtype);
  check_tensors("grads", lists.grads, narrow_grads ? at::kBFloat16 : dtype);
  check_tensors("exp_avgs", lists.exp_avgs, dtype);
  check_tensors("exp_avg_sqs", lists.exp_avg_sqs, dtype);
  if (!lists.max_exp_avg_sqs.empty()) check_tensors("max_exp_avg_sqs", lists.max_exp_avg_sqs, dtype);
  check_list("state_steps", lists.state_steps);
  if (!lists.packed.empty()) check_list("packed", lists.packed);
  for (size_t i = 0; i < lists.packed.size(); ++i) {
    if (lists.packed[i].numel() == 0) continue;
    TORCH_CHECK_VALUE(params[i].dim() == 2 && params[i].is_contiguous() && dtype == at::kFloat, "params[", i,
                      "] must be a contiguous float32 matrix to be packed");
    check_packed(lists.packed[i], params[i], at::kBFloat16);
  }
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& step = lists.state_steps[i];
    TORCH_CHECK_VALUE(step.numel() == 1, "state_steps[", i, "] must be one number, got ", step.sizes());
    TORCH_CHECK_TYPE(step.scalar_type() == at::kFloat || step.scalar_type() == at::kDouble, "state_steps[", i,
                     "] must be float32 or float64, got ", step.scalar_type());
  }
}

// Adds one to the step counter and returns it.
double advance(const Tensor& step) {
  if (step.scalar_type() == at::kFloat) return *static_cast<float*>(step.mutable_data_ptr()) += 1.0f;
  return *static_cast<double*>(step.mutable_data_ptr()) += 1.0;
}

// What the kernel writes in the place of a tensor that it cannot take.
struct Copy {
  Tensor original, dense;
};

template <class T, class Grad>
void step(cpu::AdamWStep<T, Grad> kernel, const Lists& lists, double lr, const cpu::AdamWOptions& options) {
  std::vector<cpu::AdamWTensor<T, Grad>> work;
  std::vector<Copy> copies;
  work.reserve(lists.params.size());
  for (size_t i = 0; i < lists.params.size(); ++i) {
    const double step = advance(lists.state_steps[i]);
    const Tensor& param = lists.params[i];
    if (param.numel() == 0) continue;
    const Tensor* max_exp_avg_sq = lists.max_exp_avg_sqs.empty() ? nullptr : &lists.max_exp_avg_sqs[i];
    // The kernel goes through a parameter's tensors in the order of memory: without gaps, and all in one order.
    bool is_dense = param.is_non_overlapping_and_dense();
    for (const Tensor* tensor : {&lists.grads[i], &lists.exp_avgs[i], &lists.exp_avg_sqs[i], max_exp_avg_sq}) {
      is_dense = is_dense && (tensor == nullptr || tensor->strides() == param.strides());
    }
    const auto memory = [&](const Tensor& tensor) {
      if (is_dense) return tensor.mutable_data_ptr();
      copies.push_back({tensor, tensor.contiguous()});
      return copies.back().dense.mutable_data_ptr();
    };
    work.push_back(
        {static_cast<T*>(memory(param)), static_cast<Grad*>(memory(lists.grads[i])),
         static_cast<T*>(memory(lists.exp_avgs[i])), static_cast<T*>(memory(lists.exp_avg_sqs[i])),
         max_exp_avg_sq == nullptr ? nullptr : static_cast<T*>(memory(*max_exp_avg_sq)), param.numel(),
         param.dim() == 2 && (!is_dense || param.is_contiguous()) ? param.size(1) : 1,
         lr / (1 - std::pow(options.beta1, step)), 1 / std::sqrt(1 - std::pow(options.beta2, step)),
         lists.packed.empty() || lists.packed[i].numel() == 0 ? nullptr : lists.packed[i].mutable_data_ptr()});
  }
  kernel(work.data(), static_cast<int64_t>(work.size()), options);
  for (const Copy& copy : copies) copy.original.copy_(copy.dense);
}

void adamw_step(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                at::TensorList max_exp_avg_sqs, at::TensorList state_steps, at::TensorList packed, double lr,
                double beta1, double beta2, double weight_decay, double eps, bool maximize, double grad_factor,
                bool clear_grads) {
  if (params.empty()) return;
  const Lists lists = {params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, packed};
  check_lists(lists);
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
