// The matrix products of attention on tiles that fit the first two cache levels, and the layouts they want.
//
// C (M, N) = or += A (M, K) * B (K, N).
//   A  row-major, any row stride.
//   B  in panels of 16 columns; inside a panel, kGroup<E> successive rows of B stand side by side for each column:
//      B[k][n] is at n / 16 * panel_stride + k / kGroup * (16 * kGroup) + n % 16 * kGroup + k % kGroup.
//   C  row-major, float (double for double).
// M is a multiple of kRowStep<E>, N of 16, K of kDepthStep<E>: callers pad with zeros. E is what elements are
// multiplied as: bf16 where the level has instructions for pairs of them, else float; double for double.
//
// gemm.h is for large products, whose operands are packed at each call and whose result leaves through an epilogue.
// Here operands are small, packed once and used many times, and results go back into the next product.
#pragma once

#include "common/simd.h"
#include "cpu/gemm_pack.h"
#include "cpu/gemm_tiles.h"

namespace warploom::cpu::WARPLOOM_LEVEL {
namespace {

constexpr int kPanel = 16;

// What elements of type T are multiplied as, and what has to live while they are.
template <class T>
using Element = typename TileOf<T>::type::Element;
template <class T>
using ProductSession = typename TileOf<T>::type::Session;

template <class T>
using Sum = typename Accumulator<T>::type;
template <class T>
using Lanes = typename VectorOf<T>::type;

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

template <class E>
constexpr int kGroup = kSame<E, bf16> ? 2 : 1;
template <class E>
constexpr int kDepthStep = kSame<E, bf16> ? 32 : 16;
#if defined(WARPLOOM_HAS_AMX)
template <class E>
constexpr int kRowStep = kSame<E, bf16> ? 16 : 4;
#else
template <class E>
constexpr int kRowStep = 4;
#endif

template <class Integer>
constexpr Integer round_up(Integer count, int64_t step) {
  return (count + step - 1) / step * step;
}

// ---- Products ----

template <class E>
WARPLOOM_INLINE Lanes<E> right_vector(const E* b) {
  return load(b);
}
template <class E>
WARPLOOM_INLINE Lanes<E> left_value(const E* a) {
  return broadcast(*a);
}
template <class V>
WARPLOOM_INLINE V multiply_add(V left, V right, V sum) {
  return fma(left, right, sum);
}

#if defined(WARPLOOM_HAS_AVX512_BF16)
WARPLOOM_INLINE __m512bh right_vector(const bf16* b) { return (__m512bh)_mm512_loadu_si512(b); }
WARPLOOM_INLINE __m512bh left_value(const bf16* a) {
  int32_t pair;
  memcpy(&pair, a, sizeof pair);
  return (__m512bh)_mm512_set1_epi32(pair);
}
WARPLOOM_INLINE Floats multiply_add(__m512bh left, __m512bh right, Floats sum) {
  return _mm512_dpbf16_ps(sum, left, right);
}
#endif

// Rows and panels whose sums stay in registers.
template <class E, int rows, int panels, bool accumulate>
WARPLOOM_INLINE void register_block(int64_t K, const E* a, int64_t a_stride, const E* b, int64_t panel_stride,
                                    Sum<E>* c, int64_t c_stride) {
  constexpr int lanes = kLanes<Lanes<E>>, per_panel = kPanel / lanes, vectors = panels * per_panel;
  Lanes<E> sums[rows][vectors] = {};
  for (int64_t k = 0; k < K; k += kGroup<E>) {
    decltype(right_vector(b)) right[vectors];
    for (int j = 0; j < vectors; ++j) {
      right[j] = right_vector(b + j / per_panel * panel_stride + k * kPanel + j % per_panel * lanes * kGroup<E>);
    }
    for (int r = 0; r < rows; ++r) {
      const auto left = left_value(a + r * a_stride + k);
      for (int j = 0; j < vectors; ++j) sums[r][j] = multiply_add(left, right[j], sums[r][j]);
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int j = 0; j < vectors; ++j) add_or_store(c + r * c_stride + j * lanes, sums[r][j], accumulate);
  }
}

template <bool accumulate, class E>
void product_in_vectors(int64_t M, int64_t N, int64_t K, const E* a, int64_t a_stride, const E* b, int64_t panel_stride,
                        Sum<E>* c, int64_t c_stride) {
  // 4 rows x 4 panels are 16 of AVX-512's 32 registers for float; narrower vectors need more registers per panel.
  constexpr int wide = kPanel / kLanes<Lanes<E>> == 1 ? 4 : 1;
  for (int64_t n = 0; n < N;) {
    const bool full = wide > 1 && N - n >= wide * kPanel;
    const E* right = b + n / kPanel * panel_stride;
    for (int64_t m = 0; m < M; m += 4) {
      const E* left = a + m * a_stride;
      Sum<E>* out = c + m * c_stride + n;
      if (full) {
        register_block<E, 4, wide, accumulate>(K, left, a_stride, right, panel_stride, out, c_stride);
      } else {
        register_block<E, 4, 1, accumulate>(K, left, a_stride, right, panel_stride, out, c_stride);
      }
    }
    n += full ? wide * kPanel : kPanel;
  }
}

#if defined(WARPLOOM_HAS_AMX)

// 16 * rows x 16 * columns of C in tiles 0 to 3; tiles 4, 5 hold A and 6, 7 hold B.
template <int rows, int columns, bool accumulate>
WARPLOOM_INLINE void tile_block(int64_t K, const bf16* a, int64_t a_stride, const bf16* b, int64_t panel_stride,
                                float* c, int64_t c_stride) {
  const int64_t a_bytes = a_stride * sizeof(bf16), c_bytes = c_stride * sizeof(float);
  float* c_low = c + 16 * c_stride;
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    if (columns == 2) _tile_loadd(1, c + 16, c_bytes);
    if (rows == 2) _tile_loadd(2, c_low, c_bytes);
    if (rows == 2 && columns == 2) _tile_loadd(3, c_low + 16, c_bytes);
  } else {
    _tile_zero(0);
    if (columns == 2) _tile_zero(1);
    if (rows == 2) _tile_zero(2);
    if (rows == 2 && columns == 2) _tile_zero(3);
  }
  for (int64_t k = 0; k < K; k += 32) {
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, b + k * kPanel, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (columns == 2) {
      _tile_loadd(7, b + panel_stride + k * kPanel, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (rows == 2) {
      _tile_loadd(5, a + 16 * a_stride + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (columns == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if (columns == 2) _tile_stored(1, c + 16, c_bytes);
  if (rows == 2) _tile_stored(2, c_low, c_bytes);
  if (rows == 2 && columns == 2) _tile_stored(3, c_low + 16, c_bytes);
}

template <bool accumulate>
void product_in_tiles(int64_t M, int64_t N, int64_t K, const bf16* a, int64_t a_stride, const bf16* b,
                      int64_t panel_stride, float* c, int64_t c_stride) {
  asm volatile("" ::: "memory");  // the compiler is not told that tile loads read what was stored before
  for (int64_t m = 0; m < M; m += 32) {
    const bool two_rows = M - m > 16;
    const bf16* left = a + m * a_stride;
    for (int64_t n = 0; n < N; n += 32) {
      const bool two_columns = N - n > 16;
      const bf16* right = b + n / kPanel * panel_stride;
      float* out = c + m * c_stride + n;
      if (two_rows && two_columns) {
        tile_block<2, 2, accumulate>(K, left, a_stride, right, panel_stride, out, c_stride);
      } else if (two_rows) {
        tile_block<2, 1, accumulate>(K, left, a_stride, right, panel_stride, out, c_stride);
      } else if (two_columns) {
        tile_block<1, 2, accumulate>(K, left, a_stride, right, panel_stride, out, c_stride);
      } else {
        tile_block<1, 1, accumulate>(K, left, a_stride, right, panel_stride, out, c_stride);
      }
    }
  }
}

#endif

// C = A * B, or C += A * B. Inside a ProductSession.
template <bool accumulate, class E>
void product(int64_t M, int64_t N, int64_t K, const E* a, int64_t a_stride, const E* b, int64_t panel_stride, Sum<E>* c,
             int64_t c_stride) {
#if defined(WARPLOOM_HAS_AMX)
  if constexpr (kSame<E, bf16>) {
    product_in_tiles<accumulate>(M, N, K, a, a_stride, b, panel_stride, c, c_stride);
    return;
  }
#endif
  product_in_vectors<accumulate>(M, N, K, a, a_stride, b, panel_stride, c, c_stride);
}

// ---- Operands ----

// The row as operands with zeros up to `padded`: the row itself where it is that already, else written to buffer.
template <class T, class E>
WARPLOOM_INLINE const E* operand_row(const T* row, int64_t count, int64_t padded, E* buffer) {
  if constexpr (kSame<T, E>) {
    if (count == padded) return row;
    memcpy(buffer, row, count * sizeof(E));
  } else {
    each_vector<Lanes<E>>(count, [&](int64_t i, auto n) { store(buffer + i, load(row + i, n), n); });
  }
  memset(buffer + count, 0, (padded - count) * sizeof(E));
  return buffer;
}

// Rows as a left operand: out (padded_rows, padded), zeros beyond the rows and columns there are.
template <class T, class E>
void pack_left(const T* rows, int64_t row_stride, int64_t num_rows, int64_t count, int64_t padded_rows, int64_t padded,
               E* out) {
  for (int64_t r = 0; r < num_rows; ++r) {
    E* row = out + r * padded;
    const E* source = operand_row(rows + r * row_stride, count, padded, row);
    if (source == row) continue;
    // In steps of a known size, for which no library function is called.
    constexpr int step = kDepthStep<E>;
    for (int64_t i = 0; i < padded; i += step) memcpy(row + i, source + i, step * sizeof(E));
  }
  memset(out + num_rows * padded, 0, (padded_rows - num_rows) * padded * sizeof(E));
}

// kDepthStep successive numbers as operands.
template <class V, class E>
WARPLOOM_INLINE void store_step(const V* values, E* out) {
  for (int i = 0; i < kDepthStep<E> / kLanes<V>; ++i) store(out + i * kLanes<V>, values[i]);
}
#if defined(WARPLOOM_HAS_AVX512_BF16)
WARPLOOM_INLINE void store_step(const Floats* values, bf16* out) {
  _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(values[1], values[0]));
}
#endif

// Interleaves kGroup rows of 16 columns into one step of a panel.
template <class E>
WARPLOOM_INLINE void store_group(const E* const* rows, int64_t column, E* out) {
  memcpy(out, rows[0] + column, kPanel * sizeof(E));
}
#if defined(WARPLOOM_HAS_AVX512_BF16)
WARPLOOM_INLINE void store_group(const bf16* const* rows, int64_t column, bf16* out) {
  const auto wide = [&](int r) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[r] + column)));
  };
  _mm512_storeu_si512(out, _mm512_or_si512(wide(0), _mm512_slli_epi32(wide(1), 16)));
}
#endif

// Rows as a right operand, B = rows: B's depth runs over the rows (zeros up to padded_rows), its columns over their
// `count` elements. buffer: kGroup * padded elements.
template <class T, class E>
void pack_right(const T* rows, int64_t row_stride, int64_t num_rows, int64_t count, int64_t padded_rows, E* out,
                int64_t panel_stride, E* buffer) {
  const int64_t padded = round_up(count, kPanel);
  for (int64_t k = 0; k < padded_rows; k += kGroup<E>) {
    const E* group[kGroup<E>];
    for (int g = 0; g < kGroup<E>; ++g) {
      E* own = buffer + g * padded;
      if (k + g < num_rows) {
        group[g] = operand_row(rows + (k + g) * row_stride, count, padded, own);
      } else {
        memset(own, 0, padded * sizeof(E));
        group[g] = own;
      }
    }
    for (int64_t n = 0; n < padded; n += kPanel) store_group(group, n, out + n / kPanel * panel_stride + k * kPanel);
  }
}

typedef uint32_t __attribute__((may_alias)) Unit32;
typedef uint64_t __attribute__((may_alias)) Unit64;

// out[j][i] = in[i][j] for 16 rows of `count` units, count a multiple of 16. A unit is what stays together: 4 or 8
// bytes.
template <class Unit>
WARPLOOM_INLINE void transpose_16_rows(const Unit* const* in, int64_t count, Unit* out, int64_t out_stride) {
  for (int64_t j = 0; j < count; ++j) {
    for (int i = 0; i < 16; ++i) out[j * out_stride + i] = in[i][j];
  }
}

#if defined(WARPLOOM_HAS_AVX512)
WARPLOOM_INLINE void transpose_16_rows(const Unit32* const* in, int64_t count, Unit32* out, int64_t out_stride) {
  for (int64_t j = 0; j < count; j += 16) {
    Ints block[16];
    for (int i = 0; i < 16; ++i) block[i] = (Ints)_mm512_loadu_si512(in[i] + j);
    transpose(block);
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + (j + i) * out_stride, (__m512i)block[i]);
  }
}
#endif

template <int bytes>
struct UnitOf {
  using type = Unit32;
};
template <>
struct UnitOf<8> {
  using type = Unit64;
};
// A group of operands, which transposing must keep together.
template <class E>
using Unit = typename UnitOf<sizeof(E) * kGroup<E>>::type;

// Rows as a right operand, B = rows^T: B's columns run over the rows (zeros up to a multiple of 16 that is at least
// padded_rows), its depth over their `count` elements, padded to `padded`. buffer: 16 * padded elements.
template <class T, class E>
void pack_right_transposed(const T* rows, int64_t row_stride, int64_t num_rows, int64_t count, int64_t padded_rows,
                           int64_t padded, E* out, E* buffer) {
  for (int64_t r = 0; r < padded_rows; r += kPanel) {
    const Unit<E>* sources[kPanel];
    for (int i = 0; i < kPanel; ++i) {
      E* own = buffer + i * padded;
      const E* source = own;
      if (r + i < num_rows) {
        source = operand_row(rows + (r + i) * row_stride, count, padded, own);
      } else {
        memset(own, 0, padded * sizeof(E));
      }
      sources[i] = reinterpret_cast<const Unit<E>*>(source);
    }
    transpose_16_rows(sources, padded / kGroup<E>, reinterpret_cast<Unit<E>*>(out + r * padded), kPanel);
  }
}

// Rows as a left operand, A = rows^T: out (count padded to 16, padded_rows), where padded_rows is a multiple of
// kDepthStep. buffer: (16 + 1) * kGroup * padded elements, padded as in pack_right.
template <class T, class E>
void pack_left_transposed(const T* rows, int64_t row_stride, int64_t num_rows, int64_t count, int64_t padded_rows,
                          E* out, E* buffer) {
  constexpr int step = kPanel * kGroup<E>;
  const int64_t padded = round_up(count, kPanel);
  E* interleaved = buffer + kGroup<E> * padded;
  for (int64_t k = 0; k < padded_rows; k += step) {
    const int64_t there = num_rows - k < 0 ? 0 : num_rows - k < step ? num_rows - k : step;
    pack_right(rows + k * row_stride, row_stride, there, count, step, interleaved, kPanel * step, buffer);
    for (int64_t d = 0; d < padded; d += kPanel) {
      const Unit<E>* sources[kPanel];
      for (int i = 0; i < kPanel; ++i) {
        sources[i] = reinterpret_cast<const Unit<E>*>(interleaved + d * step + i * step);
      }
      transpose_16_rows(sources, kPanel, reinterpret_cast<Unit<E>*>(out + d * padded_rows + k),
                        padded_rows / kGroup<E>);
    }
  }
}

}  // namespace
}  // namespace warploom::cpu::WARPLOOM_LEVEL
