#include <cmath>

#include "bindings/adamw.h"
#include "bindings/stream.h"
#include "cuda/adamw.h"

namespace warploom::bindings {
namespace {

void check_copies(const AdamWLists& lists) {
  for (size_t i = 0; i < lists.packed.size(); ++i) {
    const Tensor &copy = lists.packed[i], &param = lists.params[i];
    if (copy.numel() == 0) continue;
    check("packed", copy, param.sizes(), at::kBFloat16);
    TORCH_CHECK_VALUE(param.is_contiguous() && copy.is_contiguous(), "params[", i, "] and its copy must be contiguous");
  }
}

template <class T, class Grad>
void step_cuda(const AdamWLists& lists, double lr, double beta1, double beta2, const cuda::AdamWOptions& options,
               Stream stream) {
  std::vector<cuda::AdamWTensor<T, Grad>> work;
  DenseTensors tensors;
  for (size_t i = 0; i < lists.params.size(); ++i) {
    const double step = advance(lists.state_steps[i]);
    const Tensor& param = lists.params[i];
    const bool is_dense = DenseTensors::are_dense(lists, i);
    const auto memory = [&](const Tensor& tensor) { return tensors.memory(tensor, is_dense); };
    const bool is_copied = !lists.packed.empty() && lists.packed[i].numel() != 0;
    work.push_back({static_cast<T*>(memory(param)), static_cast<Grad*>(memory(lists.grads[i])),
                    static_cast<T*>(memory(lists.exp_avgs[i])), static_cast<T*>(memory(lists.exp_avg_sqs[i])),
                    lists.max_exp_avg_sqs.empty() ? nullptr : static_cast<T*>(memory(lists.max_exp_avg_sqs[i])),
                    is_copied ? static_cast<bf16*>(lists.packed[i].mutable_data_ptr()) : nullptr, param.numel(),
                    static_cast<float>(lr / (1 - std::pow(beta1, step))),
                    static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step)))});
  }
  cuda::launch_adamw_step<T, Grad>(work.data(), static_cast<int>(work.size()), options, stream);
  tensors.write_back();
}

void adamw_step_cuda(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                     at::TensorList max_exp_avg_sqs, at::TensorList state_steps, at::TensorList packed, double lr,
                     double beta1, double beta2, double weight_decay, double eps, bool maximize, double grad_factor,
                     bool clear_grads) {
  if (params.empty()) return;
  const CurrentStream stream(params[0]);
  const AdamWLists lists = {params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, packed};
  check_lists(lists);
  check_copies(lists);
  for (const at::TensorList list : {params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, packed}) {
    for (const Tensor& tensor : list) {
      TORCH_CHECK_VALUE(tensor.device() == params[0].device(), "every tensor must be on ", params[0].device(),
                        " as params[0] is, got one on ", tensor.device());
    }
  }
  for (const Tensor& step : state_steps) {
    TORCH_CHECK_VALUE(step.is_cpu(), "state_steps must be on the CPU, got one on ", step.device());
  }
  const cuda::AdamWOptions options = {static_cast<float>(1 - beta1),
                                      static_cast<float>(beta2),
                                      static_cast<float>(1 - beta2),
                                      static_cast<float>(eps),
                                      static_cast<float>(1 - lr * weight_decay),
                                      static_cast<float>(maximize ? -grad_factor : grad_factor),
                                      clear_grads};
  if (params[0].scalar_type() == grads[0].scalar_type()) {
    switch_gpu_dtype(params[0], [&](auto element) {
      using T = decltype(element);
      step_cuda<T, T>(lists, lr, beta1, beta2, options, stream.get());
    });
  } else {
    step_cuda<float, bf16>(lists, lr, beta1, beta2, options, stream.get());
  }
  // Autograd shall notice if it saved a parameter for a backward pass that is still to come.
  for (const Tensor& param : params) param.unsafeGetTensorImpl()->bump_version();
}

TORCH_LIBRARY_FRAGMENT(warploom_cuda, m) {
  m.def(
      "adamw_step(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
      "Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] state_steps, Tensor(g!)[] packed, float lr, float beta1, float "
      "beta2, "
      "float weight_decay, float eps, bool maximize, float grad_factor, bool clear_grads) -> ()",
      adamw_step_cuda);
}

}  // namespace
}  // namespace warploom::bindings
