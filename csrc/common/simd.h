// A vector of floats (and one of doubles) as wide as the level's registers, the same code at every level.
//
// Floats and Doubles are compiler vector types: + - * / and == < work on them lane by lane, v[i] is a lane, Floats{} is
// zero. load and store convert from and to bf16 and fp16; arithmetic is always in float or double. A last argument n
// takes the first n lanes only: lanes beyond are read as zero and never written.
//
//   each_vector<Floats>(C, [&](int64_t i, auto n) { store(y + i, load(x + i, n) * scale, n); });
//
// Only for files that are compiled per level: see common/levels.h for what such a file must not do.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtypes.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// What the level has; the preprocessor cannot compare WARPLOOM_LEVEL, so setup.py also defines WARPLOOM_LEVEL_<name>.
#if defined(WARPLOOM_LEVEL_amx)
#define WARPLOOM_HAS_AMX 1
#endif
#if defined(WARPLOOM_LEVEL_avx512_bf16) || defined(WARPLOOM_HAS_AMX)
#define WARPLOOM_HAS_AVX512_BF16 1
#endif
#if defined(WARPLOOM_LEVEL_avx512) || defined(WARPLOOM_HAS_AVX512_BF16)
#define WARPLOOM_HAS_AVX512 1
#endif
#if defined(WARPLOOM_LEVEL_avx2) || defined(WARPLOOM_HAS_AVX512)
#define WARPLOOM_HAS_AVX2 1
#endif

#define WARPLOOM_INLINE inline __attribute__((always_inline))

namespace warploom::cpu::WARPLOOM_LEVEL {

#if defined(WARPLOOM_HAS_AVX512)
constexpr int kVectorBytes = 64;
#elif defined(WARPLOOM_HAS_AVX2)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef double Doubles __attribute__((vector_size(kVectorBytes)));

template <class V>
constexpr int kLanes = sizeof(V) / sizeof(V{}[0]);
constexpr int kWidth = kLanes<Floats>;

// The vector that elements of type T are computed in.
template <class T>
struct VectorOf {
  using type = Floats;
};
template <>
struct VectorOf<double> {
  using type = Doubles;
};

// As a count of lanes: all of them, known to the compiler.
struct All {};

template <class V, class Body>
WARPLOOM_INLINE void each_vector(int64_t count, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes<V> <= count; i += kLanes<V>) body(i, All{});
  if (i < count) body(i, static_cast<int>(count - i));
}

// Asks for the cache line some bytes beyond p, which may lie outside of any array. The processor's own prefetching
// keeps up with a copy, but not with tens of instructions between two lines, and loads alone then have too few lines
// under way: one core of a Sapphire Rapids, whose third cache is far away, took 4.2 ms for layer_norm of 8192 x 768
// bf16 without this, 2.6 with it; 15.3 and 6.6 ms for cross_entropy of 2048 x 8192. 4 KiB did no better, 1 KiB worse.
constexpr int64_t kPrefetchBytes = 2048;
WARPLOOM_INLINE void prefetch_ahead(const void* p, int64_t bytes = kPrefetchBytes) {
  __builtin_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes)));
}

// ---- 16-bit conversions of one element ----

WARPLOOM_INLINE float to_float(float x) { return x; }
WARPLOOM_INLINE double to_float(double x) { return x; }

WARPLOOM_INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

WARPLOOM_INLINE float to_float(fp16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  float result;
  memcpy(&result, &magnitude, sizeof result);
  // The exponents' biases differ by 112; multiplying also normalises fp16 subnormals.
  result *= 0x1p112f;
  memcpy(&magnitude, &result, sizeof result);
  if ((x.bits & 0x7c00) == 0x7c00) magnitude = 0x7f800000u | (static_cast<uint32_t>(x.bits & 0x3ff) << 13);
  magnitude |= sign;
  memcpy(&result, &magnitude, sizeof result);
  return result;
}

WARPLOOM_INLINE void from_float(float x, float* out) { *out = x; }
WARPLOOM_INLINE void from_float(double x, double* out) { *out = x; }

WARPLOOM_INLINE void from_float(float x, bf16* out) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  // To nearest, ties to even. The carry would turn some NaNs into infinities, so those keep their top bits.
  out->bits = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

WARPLOOM_INLINE void from_float(float x, fp16* out) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00 | ((magnitude >> 13) & 0x3ff);
  } else if (magnitude >= 0x477ff000) {  // 65520 rounds to infinity
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 leaves the rounded subnormal in the low bits
    float shifted;
    memcpy(&shifted, &magnitude, sizeof shifted);
    shifted += 0.5f;
    memcpy(&half, &shifted, sizeof half);
    half -= 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

// ---- Load, store, lane-wise maximum: where the levels differ ----

#if defined(WARPLOOM_HAS_AVX512)

WARPLOOM_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }

WARPLOOM_INLINE Floats load(const float* p, All = {}) { return _mm512_loadu_ps(p); }
WARPLOOM_INLINE Floats load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
WARPLOOM_INLINE void store(float* p, Floats v, All = {}) { _mm512_storeu_ps(p, v); }
WARPLOOM_INLINE void store(float* p, Floats v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }

WARPLOOM_INLINE Floats widen(bf16, __m256i halves) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
WARPLOOM_INLINE Floats widen(fp16, __m256i halves) { return _mm512_cvtph_ps(halves); }

WARPLOOM_INLINE __m256i narrow(fp16, Floats v) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#if defined(WARPLOOM_HAS_AVX512_BF16)
// The instruction flushes float subnormals to zero; the lower levels keep them.
WARPLOOM_INLINE __m256i narrow(bf16, Floats v) { return (__m256i)_mm512_cvtneps_pbh(v); }
#else
WARPLOOM_INLINE __m256i narrow(bf16, Floats v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, quiet), 16));
}
#endif

template <class Half>
WARPLOOM_INLINE Floats load(const Half* p, All = {}) {
  return widen(Half{}, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <class Half>
WARPLOOM_INLINE Floats load(const Half* p, int n) {
  return widen(Half{}, _mm256_maskz_loadu_epi16(first(n), p));
}
template <class Half>
WARPLOOM_INLINE void store(Half* p, Floats v, All = {}) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(Half{}, v));
}
template <class Half>
WARPLOOM_INLINE void store(Half* p, Floats v, int n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow(Half{}, v));
}

WARPLOOM_INLINE Floats broadcast(float x) { return _mm512_set1_ps(x); }
WARPLOOM_INLINE Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
WARPLOOM_INLINE Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
WARPLOOM_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

#else

#if defined(WARPLOOM_HAS_AVX2)

WARPLOOM_INLINE Floats load(const float* p, All = {}) { return _mm256_loadu_ps(p); }
WARPLOOM_INLINE void store(float* p, Floats v, All = {}) { _mm256_storeu_ps(p, v); }
WARPLOOM_INLINE Floats load(const bf16* p, All = {}) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
WARPLOOM_INLINE Floats load(const fp16* p, All = {}) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
WARPLOOM_INLINE void store(bf16* p, Floats v, All = {}) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i top = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1)));
}
WARPLOOM_INLINE void store(fp16* p, Floats v, All = {}) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

WARPLOOM_INLINE Floats broadcast(float x) { return _mm256_set1_ps(x); }
WARPLOOM_INLINE Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
WARPLOOM_INLINE Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
WARPLOOM_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

#else

WARPLOOM_INLINE Floats load(const float* p, All = {}) {
  Floats v;
  memcpy(&v, p, sizeof v);
  return v;
}
WARPLOOM_INLINE void store(float* p, Floats v, All = {}) { memcpy(p, &v, sizeof v); }

template <class Half>
WARPLOOM_INLINE Floats load(const Half* p, All = {}) {
  Floats v;
  for (int i = 0; i < kWidth; ++i) v[i] = to_float(p[i]);
  return v;
}
template <class Half>
WARPLOOM_INLINE void store(Half* p, Floats v, All = {}) {
  for (int i = 0; i < kWidth; ++i) from_float(v[i], p + i);
}
#if defined(WARPLOOM_LEVEL_neon_bf16)
WARPLOOM_INLINE void store(bf16* p, Floats v, All = {}) {
  const bfloat16x4_t halves = vcvt_bf16_f32(v);
  memcpy(p, &halves, sizeof halves);
}
#endif

WARPLOOM_INLINE Floats broadcast(float x) { return Floats{x, x, x, x}; }
// As the x86 instructions: the second operand if either is NaN.
WARPLOOM_INLINE Floats max(Floats a, Floats b) { return a > b ? a : b; }
WARPLOOM_INLINE Floats min(Floats a, Floats b) { return a < b ? a : b; }
#if defined(__aarch64__)
WARPLOOM_INLINE Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
#else
WARPLOOM_INLINE Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
#endif

#endif

// Without masked instructions the lanes go through the stack.
template <class T>
WARPLOOM_INLINE Floats load(const T* p, int n) {
  T lanes[kWidth] = {};
  memcpy(lanes, p, static_cast<unsigned>(n) * sizeof(T));
  return load(lanes);
}
template <class T>
WARPLOOM_INLINE void store(T* p, Floats v, int n) {
  T lanes[kWidth];
  store(lanes, v);
  memcpy(p, lanes, static_cast<unsigned>(n) * sizeof(T));
}

#endif

// ---- Doubles: for float64 checks, not for speed ----

WARPLOOM_INLINE Doubles load(const double* p, All = {}) {
  Doubles v;
  memcpy(&v, p, sizeof v);
  return v;
}
WARPLOOM_INLINE Doubles load(const double* p, int n) {
  Doubles v = {};
  memcpy(&v, p, static_cast<unsigned>(n) * sizeof(double));
  return v;
}
WARPLOOM_INLINE void store(double* p, Doubles v, All = {}) { memcpy(p, &v, sizeof v); }
WARPLOOM_INLINE void store(double* p, Doubles v, int n) { memcpy(p, &v, static_cast<unsigned>(n) * sizeof(double)); }
WARPLOOM_INLINE Doubles broadcast(double x) { return x - Doubles{}; }  // x - 0 is x, for -0 and NaN too
WARPLOOM_INLINE Doubles max(Doubles a, Doubles b) { return a > b ? a : b; }
WARPLOOM_INLINE Doubles fma(Doubles a, Doubles b, Doubles c) { return a * b + c; }

// ---- Built from the above ----

// Zero beyond the first n lanes.
template <class V>
WARPLOOM_INLINE V keep_first(V v, All) {
  return v;
}
template <class V>
WARPLOOM_INLINE V keep_first(V v, int n) {
  for (int i = 0; i < kLanes<V>; ++i) v[i] = i < n ? v[i] : 0;
  return v;
}

// -inf beyond the first n lanes.
template <class V>
WARPLOOM_INLINE V hide_beyond(V v, All) {
  return v;
}
template <class V>
WARPLOOM_INLINE V hide_beyond(V v, int n) {
  for (int i = 0; i < kLanes<V>; ++i) v[i] = i < n ? v[i] : -static_cast<decltype(v[0] + v[0])>(__builtin_inf());
  return v;
}

template <class V>
WARPLOOM_INLINE auto sum(V v) {
  // In halves, so that the order is the same as the tree a wider level would use.
  auto lanes = v;
  for (int half = kLanes<V> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

template <class V>
WARPLOOM_INLINE auto max_lane(V v) {
  decltype(v[0] + v[0]) best = v[0];
  for (int i = 1; i < kLanes<V>; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// 2^x to 2 units in the last place; 0 and infinity beyond the range of float, NaN for NaN.
WARPLOOM_INLINE Floats exp2(Floats x) {
  // The bounds come first: max and min return their second operand for NaN.
  x = min(broadcast(160.0f), max(broadcast(-160.0f), x));
  const Floats shift = broadcast(0x1.8p23f);  // adding it rounds to the nearest integer
  const Floats whole = (x + shift) - shift;
  const Floats part = x - whole;  // in [-0.5, 0.5]
  // Cephes exp2f.
  Floats p = broadcast(1.535336188319500e-4f);
  p = fma(p, part, broadcast(1.339887440266574e-3f));
  p = fma(p, part, broadcast(9.618437357674640e-3f));
  p = fma(p, part, broadcast(5.550332471162809e-2f));
  p = fma(p, part, broadcast(2.402264791363012e-1f));
  p = fma(p, part, broadcast(6.931472028550421e-1f));
  p = fma(p, part, broadcast(1.0f));
#if defined(WARPLOOM_HAS_AVX512)
  return _mm512_scalef_ps(p, whole);
#else
  // In two factors, since 2^whole alone may not be a float though the product is.
  const Ints n = __builtin_convertvector(whole, Ints);
  const Ints low = n >> 1;
  const Ints high = n - low;
  return p * (Floats)((low + 127) << 23) * (Floats)((high + 127) << 23);
#endif
}

WARPLOOM_INLINE Doubles exp2(Doubles x) {
  for (int i = 0; i < kLanes<Doubles>; ++i) x[i] = __builtin_exp2(x[i]);
  return x;
}

}  // namespace warploom::cpu::WARPLOOM_LEVEL
