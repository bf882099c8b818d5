// Packing of gemm operands into panels (gemm_tiles.h has their layout), a square block of cells at a time.
//
// A cell is what one lane of the micro-kernel eats: a float, a double, or two bf16 of neighbouring k. A block is loaded
// as vectors of cells along whichever of its directions lies contiguous in memory, turned around in registers if the
// panel wants the other one, and stored. Cells beyond the operand's edges are loaded as zeros. Loading converts: float
// weights become panels of bf16 in one pass.
#pragma once

#include "common/simd.h"

namespace warploom::cpu::WARPLOOM_LEVEL {

// One operand of a product: its rows for A, its columns for B, numbered p below P, of K elements each. Element (p, k)
// is at data[p * stride + k] if kAlongK, k being contiguous, else at data[k * stride + p].
template <class Type, bool kIsAlongK>
struct Operand {
  using T = Type;
  static constexpr bool kAlongK = kIsAlongK;
  const T* data;
  int64_t stride, P, K;
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

  template <class Source>
  static WARPLOOM_INLINE V load_along_k(const Source& source, int64_t p, int64_t k, int n) {
    return load(source.data + p * source.stride + k, n);
  }
  template <class Source>
  static WARPLOOM_INLINE V load_along_p(const Source& source, int64_t p, int64_t k, int n) {
    return load(source.data + k * source.stride + p, n);
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

  template <class Source>
  static WARPLOOM_INLINE Ints load_along_k(const Source& source, int64_t p, int64_t k, int n) {
    const int64_t left = source.K - k;
    return load_elements(source.data + p * source.stride + k, left < 2 * n ? static_cast<int>(left) : 2 * n);
  }
  template <class Source>
  static WARPLOOM_INLINE Ints load_along_p(const Source& source, int64_t p, int64_t k, int n) {
    const auto* even = source.data + k * source.stride + p;
    return interleave(even, k + 1 < source.K ? even + source.stride : even, k + 1 < source.K ? n : 0, n);
  }
  static WARPLOOM_INLINE Floats total(Ints cells) {
    return (Floats)(cells << 16) + (Floats)(cells & static_cast<int32_t>(0xffff0000));
  }

 private:
  // The first n of 32 consecutive elements.
  static WARPLOOM_INLINE Ints load_elements(const bf16* data, int n) {
    return (Ints)_mm512_maskz_loadu_epi16(n == 32 ? ~0u : (1u << n) - 1, data);
  }
  static WARPLOOM_INLINE Ints load_elements(const float* data, int n) {
    const Floats low = load(data, n < 16 ? n : 16), high = n > 16 ? load(data + 16, n - 16) : Floats{};
    return (Ints)_mm512_cvtne2ps_pbh(high, low);
  }
  // Pairs of an element of `even` and one of `odd`, the first n_even and n_odd of 16.
  static WARPLOOM_INLINE Ints interleave(const bf16* even, const bf16* odd, int n_odd, int n_even) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n_even), even));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n_odd), odd));
    return (Ints)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
  static WARPLOOM_INLINE Ints interleave(const float* even, const float* odd, int n_odd, int n_even) {
    const __m256i low = narrow(bf16{}, load(even, n_even)), high = narrow(bf16{}, load(odd, n_odd));
    return (Ints)_mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
  }
};

WARPLOOM_INLINE void store(bf16* p, Ints pairs, int n) { _mm512_mask_storeu_epi32(p, first(n), (__m512i)pairs); }

#endif

constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

WARPLOOM_INLINE int clip(int64_t x, int bound) { return static_cast<int>(x < 0 ? 0 : x < bound ? x : bound); }

#if defined(WARPLOOM_HAS_AVX512_BF16)

// Packs 32 columns of 32 consecutive k into rows of 32 k: half of the loads and shuffles that 16 columns at a time
// take. totals gain the columns' sums, unless null.
[[maybe_unused]] static void turn_32_columns(const bf16* data, int64_t stride, bf16* out, float* totals) {
  Ints low[16], high[16];
  Floats low_total = {}, high_total = {};
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  for (int i = 0; i < 16; ++i) {
    const __m512i even = _mm512_loadu_si512(data + 2 * i * stride),
                  odd = _mm512_loadu_si512(data + (2 * i + 1) * stride);
    // Unpacking works within 128 bits: lane 4 q + j of low holds column 8 q + j, of high column 8 q + 4 + j.
    low[i] = (Ints)_mm512_unpacklo_epi16(even, odd);
    high[i] = (Ints)_mm512_unpackhi_epi16(even, odd);
    if (totals != nullptr) {
      low_total = _mm512_dpbf16_ps(low_total, (__m512bh)low[i], ones);
      high_total = _mm512_dpbf16_ps(high_total, (__m512bh)high[i], ones);
    }
  }
  transpose(low);
  transpose(high);
  for (int i = 0; i < 16; ++i) {
    const int column = 8 * (i / 4) + i % 4;
    _mm512_storeu_si512(out + column * 32, (__m512i)low[i]);
    _mm512_storeu_si512(out + (column + 4) * 32, (__m512i)high[i]);
  }
  if (totals == nullptr) return;
  for (int i = 0; i < 16; ++i) {
    const int column = 8 * (i / 4) + i % 4;
    totals[column] += low_total[i];
    totals[column + 4] += high_total[i];
  }
}

#endif

// Packs rows [p, p + kPanel) of the operand for k in [k_begin, k_end) into `panel`, padded with zeros to a multiple of
// kDepth. If sums is not null, sums[0 .. kPanel) gain the packed values added up over k; not for operands along k.
// k_begin must be a multiple of kDepth, and k_end too unless it is K.
template <int kPanel, int kGroup, int kDepth, class Element, class Source, class Sum>
static void pack_panel(const Source& source, int64_t p, int64_t k_begin, int64_t k_end, Element* panel, Sum* sums) {
  using Cells = CellsOf<Element>;
  using V = typename Cells::Vector;
  constexpr int kBlock = kLanes<V>, kWidth = kPanel < kBlock ? kPanel : kBlock;
  constexpr bool kPanelAlongK = kGroup > Cells::kDepth;
  static_assert(!kPanelAlongK || (kGroup == kBlock * Cells::kDepth && kPanel % kBlock == 0));
  const int64_t filled_cells = (k_end - k_begin + Cells::kDepth - 1) / Cells::kDepth;
  const int64_t cells = (k_end - k_begin + kDepth - 1) / kDepth * (kDepth / Cells::kDepth);

  int64_t first_cell = 0;
#if defined(WARPLOOM_HAS_AVX512_BF16)
  if constexpr (!Source::kAlongK && kPanel == 32 && kGroup == 32 && sizeof(typename Source::T) == sizeof(bf16)) {
    if (source.P - p >= kPanel) {
      for (; k_end - k_begin >= 2 * first_cell + 32; first_cell += 16) {
        const int64_t k = k_begin + 2 * first_cell;
        turn_32_columns(source.data + k * source.stride + p, source.stride, panel + 2 * first_cell * kPanel, sums);
      }
    }
  }
#endif

  for (int column = 0; column < kPanel; column += kBlock) {
    const int width = clip(kPanel - column, kBlock), filled_width = clip(source.P - p - column, width);
    typename VectorOf<Sum>::type total = {};
    // Inlined twice, once with constants: whole blocks, all but the last ones, then run without masks or conditions.
    const auto pack_block = [&](int64_t cell, int width, int depth, int filled_width,
                                int filled_depth) __attribute__((always_inline)) {
      const int64_t k = k_begin + cell * Cells::kDepth;
      V block[kBlock] = {};
      if constexpr (Source::kAlongK) {
        for (int i = 0; i < filled_width; ++i) block[i] = Cells::load_along_k(source, p + column + i, k, filled_depth);
      } else {
        for (int i = 0; i < filled_depth; ++i) {
          block[i] = Cells::load_along_p(source, p + column, k + i * Cells::kDepth, filled_width);
          if (sums != nullptr) total += Cells::total(block[i]);
        }
      }
      if constexpr (Source::kAlongK != kPanelAlongK) transpose(block);
      if constexpr (kPanelAlongK) {
        Element* to = panel + cell * Cells::kDepth * kPanel + column * kGroup;
        for (int i = 0; i < width; ++i) store(to + i * kGroup, block[i], kBlock);
      } else {
        Element* to = panel + (cell * kPanel + column) * kGroup;
        for (int i = 0; i < depth; ++i) store(to + i * kPanel * kGroup, block[i], width);
      }
    };
    int64_t cell = first_cell;
    if (filled_width == kWidth) {
      const int64_t whole_cells = (k_end - k_begin) / Cells::kDepth;
      for (; cell + kBlock <= whole_cells; cell += kBlock) pack_block(cell, kWidth, kBlock, kWidth, kBlock);
    }
    for (; cell < cells; cell += kBlock) {
      const int depth = clip(cells - cell, kBlock);
      pack_block(cell, width, depth, filled_width, clip(filled_cells - cell, depth));
    }
    if (sums != nullptr) store(sums + column, load(sums + column, width) + total, width);
  }
}

// Packs `panels` panels from row p on, panel_size elements apart, in the order that reads the source front to back:
// panel by panel along k, else some k of all panels at a time.
template <int kPanel, int kGroup, int kDepth, class Element, class Source, class Sum>
static void pack_panels(const Source& source, int64_t p, int64_t panels, int64_t k_begin, int64_t k_end, Element* out,
                        int64_t panel_size, Sum* sums) {
  constexpr int64_t kStretch = 64;
  const int64_t step = Source::kAlongK || k_end <= k_begin ? larger(k_end - k_begin, 1) : kStretch;
  for (int64_t k = k_begin; k < larger(k_end, k_begin + 1); k += step) {
    for (int64_t i = 0; i < panels; ++i) {
      pack_panel<kPanel, kGroup, kDepth>(source, p + i * kPanel, k, k + step < k_end ? k + step : k_end,
                                         out + i * panel_size + (k - k_begin) * kPanel,
                                         sums == nullptr ? sums : sums + i * kPanel);
    }
  }
}

}  // namespace warploom::cpu::WARPLOOM_LEVEL
