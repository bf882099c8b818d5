#include "cpu/rotary.h"

#include "common/parallel.h"
#include "common/simd.h"

namespace warploom::cpu::WARPLOOM_LEVEL {

constexpr double kHalfPi = 1.57079632679489661923;

WARPLOOM_INLINE void sin_cos(double angle, double* sine, double* cosine) {
  *sine = __builtin_sin(angle);
  *cosine = __builtin_cos(angle);
}

// Taken into [-pi/4, pi/4] in double, so that far positions lose no digits, then by the polynomials of Cephes' sinf and
// cosf, whose error is below one unit in the last place. Without a branch, for the compiler to make vectors of it.
WARPLOOM_INLINE void sin_cos(double angle, float* sine, float* cosine) {
  constexpr double kRound = 0x1.8p52;  // added and taken away again, it leaves the nearest integer
  const double shifted = angle * (1 / kHalfPi) + kRound;
  int64_t quadrant;
  memcpy(&quadrant, &shifted, sizeof quadrant);  // its low bits are those of the integer
  const float x = static_cast<float>(angle - (shifted - kRound) * kHalfPi), x2 = x * x;
  const float s = x + x * x2 * (-1.6666654611e-1f + x2 * (8.3321608736e-3f + x2 * -1.9515295891e-4f));
  const float c = 1 - 0.5f * x2 + x2 * x2 * (4.1666645683e-2f + x2 * (-1.3887316255e-3f + x2 * 2.4433157118e-5f));
  const bool swapped = quadrant & 1;
  const float swapped_s = swapped ? c : s, swapped_c = swapped ? s : c;
  *sine = quadrant & 2 ? -swapped_s : swapped_s;
  *cosine = (quadrant + 1) & 2 ? -swapped_c : swapped_c;
}

template <class T>
static void turn(const Rotary<T>& args) {
  using V = typename VectorOf<T>::type;
  using S = typename Accumulator<T>::type;
  constexpr int64_t kTokensPerBlock = 16;
  const int64_t half = args.rotary_dim / 2, tokens = args.num_tokens;
  double* frequencies = scratch<double>(0, half);
  for (int64_t i = 0; i < half; ++i) {
    frequencies[i] = __builtin_pow(args.base, -2.0 * static_cast<double>(i) / static_cast<double>(args.rotary_dim));
  }

  // Cosines and sines of each position, (count, 2, half): all heads, and all rows if they can, share them.
  const int64_t count = args.each_row ? args.num_rows * tokens : tokens;
  S* table = scratch<S>(1, count * 2 * half);
  parallel_for((count + kTokensPerBlock - 1) / kTokensPerBlock, [=](int64_t block) {
    const int64_t last = (block + 1) * kTokensPerBlock;
    for (int64_t at = block * kTokensPerBlock; at < (last < count ? last : count); ++at) {
      const double position = static_cast<double>(args.positions[at]) * args.direction;
      S* cosines = table + at * 2 * half;
      for (int64_t i = 0; i < half; ++i) sin_cos(position * frequencies[i], cosines + half + i, cosines + i);
    }
  });

  const int64_t places = args.num_rows * tokens;
  parallel_for((places + kTokensPerBlock - 1) / kTokensPerBlock, [=](int64_t block) {
    const int64_t last = (block + 1) * kTokensPerBlock;
    for (int64_t at = block * kTokensPerBlock; at < (last < places ? last : places); ++at) {
      const int64_t row = at / tokens, token = at % tokens;
      const S* cosines = table + (args.each_row ? at : token) * 2 * half;
      for (int64_t head = 0; head < args.num_heads; ++head) {
        const T* x = args.x + row * args.row_stride + head * args.head_stride + token * args.token_stride;
        T* y = args.y + (at * args.num_heads + head) * args.D;
        each_vector<V>(half, [&](int64_t i, auto n) {
          const V c = load(cosines + i, n), s = load(cosines + half + i, n);
          const V first = load(x + i, n), second = load(x + half + i, n);
          store(y + i, first * c - second * s, n);
          store(y + half + i, second * c + first * s, n);
        });
        memcpy(y + args.rotary_dim, x + args.rotary_dim, static_cast<uint64_t>(args.D - args.rotary_dim) * sizeof(T));
      }
    }
  });
}

extern const RotaryTable rotary = {{turn<float>}, {turn<double>}, {turn<bf16>}, {turn<fp16>}};

}  // namespace warploom::cpu::WARPLOOM_LEVEL
