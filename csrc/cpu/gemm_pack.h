// Packing of gemm operands into panels (gemm_tiles.h has their layout), a square block of cells at a time.
//
// A cell is what one lane of the micro-kernel eats: a float, a double, or two bf16 of neighbouring k. A block is loaded
// as vectors of cells along whichever of its directions lies contiguous in memory, turned around in registers if the
// panel wants the other one, and stored. Cells beyond the operand's edges are loaded as zeros.
#pragma once

#include "common/simd.h"

namespace warploom::cpu::WARPLOOM_LEVEL {

// One operand of a product: its rows for A, its columns for B, numbered p, of K elements each.
template <class T>
struct Operand {
  const T* data;
  int64_t stride;        // from one p to the next if k is contiguous, else from one k to the next
  bool k_is_contiguous;  // element (p, k) at data[p * stride + k], else at data[k * stride + p]
  const T* relu;         // null, or laid out as data: elements count as zero where this is not positive
  int64_t P, K;
};

template <class V, int kSide>
WARPLOOM_INLINE void transpose(V (&block)[kSide]) {
  V turned[kSide];
  for (int i = 0; i < kSide; ++i) {
    for (int j = 0; j < kSide; ++j) turned[i][j] = block[j][i];
  }
  for (int i = 0; i < kSide; ++i) block[i] = turned[i];
}

#if defined(WARPLOOM_HAS_AVX512)

// Of 32-bit cells.
template <class V>
WARPLOOM_INLINE void transpose(V (&block)[16]) {
  __m512i pairs[16], quads[16];
  for (int i = 0; i < 16; i += 2) {
    const __m512i a = (__m512i)block[i], b = (__m512i)block[i + 1];
    pairs[i] = _mm512_unpacklo_epi32(a, b);
    pairs[i + 1] = _mm512_unpackhi_epi32(a, b);
  }
  for (int i = 0; i < 16; i += 4) {
    quads[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
    quads[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    quads[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    quads[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
  // quads[4 g + j] holds, in its 128-bit part l, column 4 l + j of rows 4 g to 4 g + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512i low02 = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0x88);  // parts 0 2 of g = 0, then of g = 1
    const __m512i low13 = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0xdd);
    const __m512i high02 = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0x88);
    const __m512i high13 = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0xdd);
    block[j] = (V)_mm512_shuffle_i32x4(low02, high02, 0x88);
    block[8 + j] = (V)_mm512_shuffle_i32x4(low02, high02, 0xdd);
    block[4 + j] = (V)_mm512_shuffle_i32x4(low13, high13, 0x88);
    block[12 + j] = (V)_mm512_shuffle_i32x4(low13, high13, 0xdd);
  }
}

#endif

// Cells of one element each, converted to the scalar of V while loading.
template <class V>
struct ScalarCells {
  using Vector = V;
  static constexpr int kDepth = 1;

  // n cells from (p, k) on, along whichever direction is contiguous.
  template <class T>
  static WARPLOOM_INLINE V along(const Operand<T>& source, int64_t p, int64_t k, int n) {
    const int64_t at = source.k_is_contiguous ? p * source.stride + k : k * source.stride + p;
    const bool whole = n == kLanes<V>;
    const V v = whole ? load(source.data + at) : load(source.data + at, n);
    if (source.relu == nullptr) return v;
    const V y = whole ? load(source.relu + at) : load(source.relu + at, n);
    return y > V{} ? v : V{};
  }
  template <class T>
  static WARPLOOM_INLINE V along_k(const Operand<T>& source, int64_t p, int64_t k, int n) {
    return along(source, p, k, n);
  }
  template <class T>
  static WARPLOOM_INLINE V along_p(const Operand<T>& source, int64_t p, int64_t k, int n) {
    return along(source, p, k, n);
  }
  static WARPLOOM_INLINE V total(V cells) { return cells; }
};

template <class Element>
struct CellsOf;
template <>
struct CellsOf<float> : ScalarCells<Floats> {};
template <>
struct CellsOf<double> : ScalarCells<Doubles> {};

#if defined(WARPLOOM_HAS_AVX512_BF16)

template <>
struct CellsOf<bf16> {
  using Vector = Ints;
  static constexpr int kDepth = 2;

  static WARPLOOM_INLINE Ints along_k(const Operand<bf16>& source, int64_t p, int64_t k, int n) {
    const int64_t at = p * source.stride + k;
    const int64_t elements = source.K - k < 2 * n ? source.K - k : 2 * n;
    __mmask32 mask = elements >= 32 ? ~0u : (1u << elements) - 1;
    if (source.relu != nullptr) {
      const __m512i y = _mm512_maskz_loadu_epi16(mask, source.relu + at);
      mask = _mm512_cmpgt_epi16_mask(y, _mm512_setzero_si512());  // bf16 orders as its bits do, for one sign
    }
    return (Ints)_mm512_maskz_loadu_epi16(mask, source.data + at);
  }
  static WARPLOOM_INLINE Ints along_p(const Operand<bf16>& source, int64_t p, int64_t k, int n) {
    const __m512i even = row(source, p, k, n);
    if (k + 1 == source.K) return (Ints)even;
    return (Ints)_mm512_or_si512(even, _mm512_slli_epi32(row(source, p, k + 1, n), 16));
  }
  static WARPLOOM_INLINE Floats total(Ints cells) {
    return (Floats)(cells << 16) + (Floats)(cells & static_cast<int32_t>(0xffff0000));
  }

 private:
  static WARPLOOM_INLINE __m512i row(const Operand<bf16>& source, int64_t p, int64_t k, int n) {
    const int64_t at = k * source.stride + p;
    __mmask16 mask = first(n);
    if (source.relu != nullptr) {
      const __m256i y = _mm256_maskz_loadu_epi16(mask, source.relu + at);
      mask = _mm256_cmpgt_epi16_mask(y, _mm256_setzero_si256());
    }
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, source.data + at));
  }
};

#endif

#if defined(WARPLOOM_HAS_AVX512)
WARPLOOM_INLINE void store(bf16* p, Ints pairs, int n) { _mm512_mask_storeu_epi32(p, first(n), (__m512i)pairs); }
#endif

WARPLOOM_INLINE int clip(int64_t x, int bound) { return static_cast<int>(x < 0 ? 0 : x < bound ? x : bound); }

// Packs rows [p, p + kPanel) of the operand for k in [k_begin, k_end) into `panel`, padded with zeros to a multiple of
// kDepth. If sums is not null, sums[0 .. kPanel) gain the packed values added up over k; k must not be contiguous then.
// k_begin must be a multiple of kDepth, and k_end too unless it is K.
template <int kPanel, int kGroup, int kDepth, class Element, class T, class Sum>
static void pack_panel(const Operand<T>& source, int64_t p, int64_t k_begin, int64_t k_end, Element* panel, Sum* sums) {
  using Cells = CellsOf<Element>;
  using V = typename Cells::Vector;
  constexpr int kBlock = kLanes<V>;
  constexpr bool kPanelAlongK = kGroup > Cells::kDepth;
  static_assert(!kPanelAlongK || (kGroup == kBlock * Cells::kDepth && kPanel % kBlock == 0));
  const int64_t filled_cells = (k_end - k_begin + Cells::kDepth - 1) / Cells::kDepth;
  const int64_t cells = (k_end - k_begin + kDepth - 1) / kDepth * (kDepth / Cells::kDepth);

  for (int column = 0; column < kPanel; column += kBlock) {
    const int width = clip(kPanel - column, kBlock), filled_width = clip(source.P - p - column, width);
    typename VectorOf<Sum>::type total = {};
    for (int64_t cell = 0; cell < cells; cell += kBlock) {
      const int depth = clip(cells - cell, kBlock), filled_depth = clip(filled_cells - cell, depth);
      const int64_t k = k_begin + cell * Cells::kDepth;
      V block[kBlock] = {};
      if (source.k_is_contiguous) {
        for (int i = 0; i < filled_width; ++i) block[i] = Cells::along_k(source, p + column + i, k, filled_depth);
      } else {
        for (int i = 0; i < filled_depth; ++i) {
          block[i] = Cells::along_p(source, p + column, k + i * Cells::kDepth, filled_width);
          if (sums != nullptr) total += Cells::total(block[i]);
        }
      }
      if (source.k_is_contiguous != kPanelAlongK) transpose(block);
      if constexpr (kPanelAlongK) {
        for (int i = 0; i < width; ++i)
          store(panel + cell * Cells::kDepth * kPanel + (column + i) * kGroup, block[i], kBlock);
      } else {
        for (int i = 0; i < depth; ++i) store(panel + ((cell + i) * kPanel + column) * kGroup, block[i], width);
      }
    }
    if (sums != nullptr) store(sums + column, load(sums + column, width) + total, width);
  }
}

}  // namespace warploom::cpu::WARPLOOM_LEVEL
