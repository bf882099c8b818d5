// Where the work of an operator on CUDA tensors goes: the device and the current stream, taken from torch's own record
// of them, without linking to torch_cuda. So the extension loads beside a torch that was built for CPUs alone.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "common/stream.h"

namespace warploom::bindings {

// While it lives, the tensor's device is the current one.
class CurrentStream {
 public:
  explicit CurrentStream(const at::Tensor& tensor) : guard_(checked(tensor).device()) {
    const c10::impl::VirtualGuardImpl cuda(c10::DeviceType::CUDA);
    stream_ = static_cast<Stream>(cuda.getStream(tensor.device()).native_handle());
  }
  Stream get() const { return stream_; }

 private:
  static const at::Tensor& checked(const at::Tensor& tensor) {
    TORCH_CHECK_VALUE(tensor.is_cuda(), "expected a tensor on a GPU, got one on ", tensor.device());
    return tensor;
  }

  c10::DeviceGuard guard_;
  Stream stream_;
};

}  // namespace warploom::bindings
