#include "cpu/grad_norm.h"

#include "common/simd.h"
#include "cpu/tensor_blocks.h"

namespace warploom::cpu::WARPLOOM_LEVEL {

WARPLOOM_INLINE void add_squares(Doubles (&sums)[2], Doubles v) { sums[0] = fma(v, v, sums[0]); }

WARPLOOM_INLINE void add_squares(Doubles (&sums)[2], Floats v) {
#if defined(WARPLOOM_HAS_AVX512)
  // GCC 12 makes four conversions of the generic form below, and with them a core computes longer than it reads.
  const Doubles wide[2] = {_mm512_cvtps_pd(_mm512_castps512_ps256(v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))};
#else
  typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
  Half halves[2];
  memcpy(halves, &v, sizeof v);
  const Doubles wide[2] = {__builtin_convertvector(halves[0], Doubles), __builtin_convertvector(halves[1], Doubles)};
#endif
  for (int i = 0; i < 2; ++i) sums[i] = fma(wide[i], wide[i], sums[i]);
}

template <class T>
static double sum_of_squares(const T* grad, int64_t size) {
  using V = typename VectorOf<T>::type;
  // Several sums, or each addition would wait for the one before.
  constexpr int kSums = 4, kStep = kSums * kLanes<V>;
  Doubles sums[kSums][2] = {};
  int64_t i = 0;
  for (; i + kStep <= size; i += kStep) {
    for (int j = 0; j < kSums; ++j) add_squares(sums[j], load(grad + i + j * kLanes<V>));
  }
  each_vector<V>(size - i, [&](int64_t rest, auto n) { add_squares(sums[0], load(grad + i + rest, n)); });
  Doubles total = {};
  for (int j = 0; j < kSums; ++j) total += sums[j][0] + sums[j][1];
  return sum(total);
}

template <class T>
static double grad_norm_fwd(const GradTensor<T>* tensors, int64_t count) {
  constexpr int64_t kElementsPerBlock = 1 << 16;
  const TensorBlocks cut =
      cut_into_blocks(count, [&](int64_t i) { return tensors[i].size; }, [](int64_t) { return kElementsPerBlock; });
  double* sums = scratch<double>(1, cut.count);
  parallel_for(cut.count, [&](int64_t i) {
    const TensorBlock& block = cut.blocks[i];
    sums[i] = sum_of_squares(tensors[block.tensor].grad + block.begin, block.end - block.begin);
  });
  double total = 0.0;
  for (int64_t i = 0; i < cut.count; ++i) total += sums[i];
  return __builtin_sqrt(total);
}

extern const GradNormTable grad_norm = {
    {grad_norm_fwd<float>}, {grad_norm_fwd<double>}, {grad_norm_fwd<bf16>}, {grad_norm_fwd<fp16>}};

}  // namespace warploom::cpu::WARPLOOM_LEVEL
