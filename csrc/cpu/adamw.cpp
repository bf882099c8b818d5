#include "cpu/adamw.h"

#include "common/simd.h"
#include "cpu/packed_weight.h"
#include "cpu/tensor_blocks.h"

namespace warploom::cpu::WARPLOOM_LEVEL {

WARPLOOM_INLINE Floats sqrt(Floats v) {
  for (int i = 0; i < kLanes<Floats>; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}
WARPLOOM_INLINE Doubles sqrt(Doubles v) {
  for (int i = 0; i < kLanes<Doubles>; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
}

// Four streams at once are more than the processor's own prefetching keeps up with, and it ends at each page: without
// this, 14 M parameters took one core of a Sapphire Rapids 15.9 ms, with it 14.8 ms.
WARPLOOM_INLINE void prefetch(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + 1024, /*rw=*/1); }

template <class T, class Grad>
static void update(const AdamWTensor<T, Grad>& tensor, int64_t begin, int64_t end, const AdamWOptions& options) {
  using V = typename VectorOf<T>::type;
  const auto constant = [](double x) { return broadcast(static_cast<typename Accumulator<T>::type>(x)); };
  T *param = tensor.param + begin, *m = tensor.exp_avg + begin, *v = tensor.exp_avg_sq + begin;
  T* max_v = tensor.max_exp_avg_sq == nullptr ? nullptr : tensor.max_exp_avg_sq + begin;
  Grad* grad = tensor.grad + begin;
  const V grad_factor = constant(options.grad_factor), decay = constant(options.decay);
  const V beta2 = constant(options.beta2), grad_share = constant(1.0 - options.beta1);
  const V square_share = constant(1.0 - options.beta2), eps = constant(options.eps);
  const V step_size = constant(tensor.step_size), denominator_scale = constant(tensor.denominator_scale);
  // Interpolation between two values is exact at the one that it starts from: it starts from the one with more weight.
  const bool from_grad = 1.0 - options.beta1 >= 0.5;

  each_vector<V>(end - begin, [&](int64_t i, auto n) {
    prefetch(grad + i);
    prefetch(m + i);
    prefetch(v + i);
    prefetch(param + i);
    const V g = load(grad + i, n) * grad_factor;
    const V m_before = load(m + i, n), change = g - m_before;
    const V m_i = from_grad ? fma(grad_share - 1, change, g) : fma(grad_share, change, m_before);
    const V v_i = fma(square_share * g, g, load(v + i, n) * beta2);
    V largest = v_i;
    if (max_v != nullptr) {
      // max returns its second operand for NaN, and so keeps a new one; an old one, once there, is in v too.
      largest = max(load(max_v + i, n), v_i);
      store(max_v + i, largest, n);
    }
    const V denominator = fma(sqrt(largest), denominator_scale, eps);
    store(param + i, load(param + i, n) * decay - step_size * m_i / denominator, n);
    store(m + i, m_i, n);
    store(v + i, v_i, n);
    if (options.clear_grads) store(grad + i, V{}, n);
  });
}

template <class T, class Grad>
static void adamw_step(const AdamWTensor<T, Grad>* tensors, int64_t count, const AdamWOptions& options) {
  // A block of a matrix is whole strips of rows, as packing takes them.
  constexpr int64_t kRows = kRowsPerStrip, kElements = 1 << 14;
  const TensorBlocks cut = cut_into_blocks(
      count, [&](int64_t i) { return tensors[i].size; },
      [&](int64_t i) {
        const int64_t strip = kRows * tensors[i].columns;
        return strip < kElements ? kElements / strip * strip : strip;
      });
  parallel_for(cut.count, [&](int64_t i) {
    const TensorBlock& block = cut.blocks[i];
    const AdamWTensor<T, Grad>& tensor = tensors[block.tensor];
    update(tensor, block.begin, block.end, options);
    if constexpr (sizeof(T) == sizeof(float)) {
      if (tensor.packed == nullptr) return;
      const int64_t C = tensor.columns;  // the block is whole rows, which are in the cache
      pack_rows<bf16>(tensor.param, tensor.size / C, C, block.begin / C, block.end / C,
                      static_cast<RightPanels<bf16>::Element*>(tensor.packed));
    }
  });
}

extern const AdamWTable adamw = {
    {{adamw_step<float, float>}, {adamw_step<double, double>}, {adamw_step<bf16, bf16>}, {adamw_step<fp16, fp16>}},
    adamw_step<float, bf16>};

}  // namespace warploom::cpu::WARPLOOM_LEVEL
