// The arguments of the AdamW operators, checked, and the memory that their kernels go through.
#pragma once

#include <vector>

#include "bindings/binding.h"

namespace warploom::bindings {

struct AdamWLists {
  at::TensorList params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, packed;
};

// Raises unless they fit together; what packed holds is for the back end to check.
inline void check_lists(const AdamWLists& lists) {
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
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& step = lists.state_steps[i];
    TORCH_CHECK_VALUE(step.numel() == 1, "state_steps[", i, "] must be one number, got ", step.sizes());
    TORCH_CHECK_TYPE(step.scalar_type() == at::kFloat || step.scalar_type() == at::kDouble, "state_steps[", i,
                     "] must be float32 or float64, got ", step.scalar_type());
  }
}

// Adds one to the step counter, which is on the CPU, and returns it.
inline double advance(const Tensor& step) {
  if (step.scalar_type() == at::kFloat) return *static_cast<float*>(step.mutable_data_ptr()) += 1.0f;
  return *static_cast<double*>(step.mutable_data_ptr()) += 1.0;
}

// The kernels go through a parameter's tensors in the order of memory, which must be without gaps and the same for all.
// Where it is not, they are given copies.
class DenseTensors {
 public:
  // Whether parameter i needs none.
  static bool are_dense(const AdamWLists& lists, size_t i) {
    const Tensor& param = lists.params[i];
    bool dense = param.is_non_overlapping_and_dense();
    for (const at::TensorList list : {lists.grads, lists.exp_avgs, lists.exp_avg_sqs, lists.max_exp_avg_sqs}) {
      dense = dense && (list.empty() || list[i].strides() == param.strides());
    }
    return dense;
  }

  void* memory(const Tensor& tensor, bool is_dense) {
    if (is_dense) return tensor.mutable_data_ptr();
    copies_.push_back({tensor, tensor.contiguous()});
    return copies_.back().dense.mutable_data_ptr();
  }

  // What the kernel left in copies goes to where it belongs.
  void write_back() const {
    for (const Copy& copy : copies_) copy.original.copy_(copy.dense);
  }

 private:
  struct Copy {
    Tensor original, dense;
  };
  std::vector<Copy> copies_;
};

}  // namespace warploom::bindings
