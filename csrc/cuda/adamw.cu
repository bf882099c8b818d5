// AdamW over many tensors: what a launch needs to know of them travels in its arguments, so that nothing is copied to
// the card first and a CUDA graph can hold the launch. A block takes one piece of one tensor.
#include <algorithm>

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "cuda/adamw.h"
#include "cuda/vector.cuh"

namespace warploom::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPiece = 4096;  // elements of one block
constexpr int kTensors = 40;  // of one launch, whose arguments are 4 KiB at most
constexpr int kMaxBlocks = 1 << 30;

template <class T, class Grad>
struct Batch {
  AdamWTensor<T, Grad> tensors[kTensors];
  int first_block[kTensors + 1];
  int count;
  AdamWOptions options;
};
static_assert(sizeof(Batch<float, float>) <= 4096);

template <class T, class Grad>
__global__ void __launch_bounds__(kThreads) adamw_step_kernel(const Batch<T, Grad> batch) {
  constexpr int kSize = 16 / sizeof(T);
  const int block = blockIdx.x;
  int index = 0;
  while (batch.first_block[index + 1] <= block) ++index;
  const AdamWTensor<T, Grad>& tensor = batch.tensors[index];
  const AdamWOptions& options = batch.options;
  const int64_t first = static_cast<int64_t>(block - batch.first_block[index]) * kPiece;
  const bool aligned =
      pointers_are_aligned<16>(tensor.param, tensor.exp_avg, tensor.exp_avg_sq, tensor.max_exp_avg_sq) &&
      pointers_are_aligned<kSize * sizeof(Grad)>(tensor.grad) &&
      pointers_are_aligned<kSize * sizeof(bf16)>(tensor.copy);

#pragma unroll
  for (int offset = 0; offset < kPiece; offset += kThreads * kSize) {
    const int64_t at = first + offset + static_cast<int>(threadIdx.x) * kSize;
    if (at >= tensor.size) return;
    const int count = static_cast<int>(tensor.size - at < kSize ? tensor.size - at : kSize);
    const bool whole = aligned && count == kSize;
    Vector<T> param, exp_avg, exp_avg_sq, largest;
    Vector<Grad, kSize> grad;
    Vector<bf16, kSize> copy;
    param.load(tensor.param + at, count, whole);
    grad.load(tensor.grad + at, count, whole);
    exp_avg.load(tensor.exp_avg + at, count, whole);
    exp_avg_sq.load(tensor.exp_avg_sq + at, count, whole);
    if (tensor.max_exp_avg_sq != nullptr) largest.load(tensor.max_exp_avg_sq + at, count, whole);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float g = grad[i] * options.grad_factor;
      const float m = exp_avg[i] + options.one_minus_beta1 * (g - exp_avg[i]);
      float v = options.beta2 * exp_avg_sq[i] + options.one_minus_beta2 * g * g;
      exp_avg.set(i, m);
      exp_avg_sq.set(i, v);
      if (tensor.max_exp_avg_sq != nullptr) {
        v = fmaxf(v, largest[i]);
        largest.set(i, v);
      }
      const float denominator = sqrtf(v) * tensor.rsqrt_correction + options.eps;
      const float p = options.decay * param[i] - tensor.step_size * (m / denominator);
      param.set(i, p);
      copy.set(i, p);
    }
    param.store(tensor.param + at, count, whole);
    exp_avg.store(tensor.exp_avg + at, count, whole);
    exp_avg_sq.store(tensor.exp_avg_sq + at, count, whole);
    if (tensor.max_exp_avg_sq != nullptr) largest.store(tensor.max_exp_avg_sq + at, count, whole);
    if (tensor.copy != nullptr) copy.store(tensor.copy + at, count, whole);
    if (options.clear_grads) Vector<Grad, kSize>().store(tensor.grad + at, count, whole);
  }
}

}  // namespace

template <class T, class Grad>
void launch_adamw_step(const AdamWTensor<T, Grad>* tensors, int count, const AdamWOptions& options, Stream stream) {
  Batch<T, Grad> batch = {};
  batch.options = options;
  const auto flush = [&] {
    if (batch.count == 0) return;
    launch(adamw_step_kernel<T, Grad>, dim3(batch.first_block[batch.count]), dim3(kThreads), 0, stream, batch);
    batch.count = 0;
  };
  for (int i = 0; i < count; ++i) {
    AdamWTensor<T, Grad> tensor = tensors[i];
    const auto blocks = static_cast<int>((tensor.size + kPiece - 1) / kPiece);
    if (blocks == 0) continue;
    if (batch.count == kTensors || batch.first_block[batch.count] > kMaxBlocks - blocks) flush();
    batch.tensors[batch.count] = tensor;
    batch.first_block[batch.count + 1] = batch.first_block[batch.count] + blocks;
    ++batch.count;
  }
  flush();
}

template void launch_adamw_step(const AdamWTensor<float, float>*, int, const AdamWOptions&, Stream);
template void launch_adamw_step(const AdamWTensor<bf16, bf16>*, int, const AdamWOptions&, Stream);
template void launch_adamw_step(const AdamWTensor<fp16, fp16>*, int, const AdamWOptions&, Stream);
template void launch_adamw_step(const AdamWTensor<float, bf16>*, int, const AdamWOptions&, Stream);

}  // namespace warploom::cuda
