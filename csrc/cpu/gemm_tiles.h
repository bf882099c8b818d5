// Micro-kernels: one kRows x kCols tile of C = A * B, out of a packed panel of A and one of B, all sums in registers.
//
// A panel holds kRows rows of A (or kPanel columns of B) for a range of k as [k / group][row][k % group], so that the
// loop over k reads it front to back; a tile takes kCols / kPanel panels of B. The groups are what the instruction eats
// at once: 1 for multiply-add, 2 for the bf16 dot product, 32 for the rows of an AMX tile of A. kDepth is the multiple
// k is padded to, with zeros. A tile that kReadsRows of an operand A takes them as they lie in memory.
//
// kRowsPerBlock, kDepthPerBlock (kDepthPacked where A has to be packed) and kSizeOfBlockB (in elements) say how much of
// C, k and B a thread works through at once: what stays in the second-level cache.
#pragma once

#include "common/simd.h"

namespace warploom::cpu::WARPLOOM_LEVEL {

#if defined(WARPLOOM_HAS_AVX512)
constexpr int kTileRows = 14, kTileVectors = 2;  // 28 sums, 2 of B, of 32 registers; A is broadcast from memory
#elif defined(WARPLOOM_HAS_AVX2)
constexpr int kTileRows = 6, kTileVectors = 2;  // 12 sums, 2 of B, 1 of A, of 16 registers
#elif defined(__aarch64__)
constexpr int kTileRows = 8, kTileVectors = 2;
#else
constexpr int kTileRows = 4, kTileVectors = 2;
#endif

constexpr int kStepsAhead = 16;  // of k, for prefetching

// Of A: row r at step k / kDepth is at data + step * step_stride + r * row_stride.
template <class Element>
struct LeftPanel {
  const Element* data;
  int64_t row_stride, step_stride;
};

// Added after the block's own sum: a sum that goes on through all blocks would round each product at its full size. In
// float32 over 3072 products that makes the largest errors twice as large.
template <class V, class Sum>
WARPLOOM_INLINE void add_or_store(Sum* tile, V sums, bool add) {
  store(tile, add ? load(tile) + sums : sums);
}

struct NoSession {
  ~NoSession() {}  // not trivial, so that a variable of this type is not unused
};

template <class Scalar, class V, int kMaxDepthOfBlock>
struct MultiplyAddTile {
  using Element = Scalar;  // of the packed panels
  using Sum = Scalar;
  using Vector = V;
  using Session = NoSession;
  static constexpr int kRows = kTileRows, kCols = kTileVectors * kLanes<V>, kPanel = kCols;
  static constexpr int kGroupA = 1, kGroupB = 1, kDepth = 1;
  static constexpr int kRowsPerBlock = 112 / kTileRows * kTileRows, kDepthPerBlock = kMaxDepthOfBlock,
                       kDepthPacked = kDepthPerBlock;
  static constexpr int64_t kSizeOfBlockB = 768 * kMaxDepthOfBlock;
  template <class A>
  static constexpr bool kReadsRows = false;

  // tile (kRows, kCols) = a * b over `depth` values of k, plus what tile holds if accumulate. Finishes `pending`.
  template <class Pending>
  static void run(int64_t depth, const LeftPanel<Scalar>& left, const Scalar* b, int64_t, Scalar* tile, bool accumulate,
                  Pending& pending) {
    pending.finish_rows(kRows);
    multiply(depth, left.data, b, tile, accumulate);
  }

 private:
  // Not inlined: among the code of an epilogue the compiler runs out of registers for the sums.
  static __attribute__((noinline)) void multiply(int64_t depth, const Scalar* a, const Scalar* b, Scalar* tile,
                                                 bool accumulate) {
    V sums[kRows][kTileVectors] = {};
    for (int64_t k = 0; k < depth; ++k, a += kRows, b += kCols) {
      // The panels come from the second-level cache; without this the first lines of each step arrive late.
      for (int v = 0; v < kTileVectors; ++v) __builtin_prefetch(b + kStepsAhead * kCols + v * kLanes<V>);
      __builtin_prefetch(a + kStepsAhead * kRows);
      V b_k[kTileVectors];
      for (int v = 0; v < kTileVectors; ++v) b_k[v] = load(b + v * kLanes<V>);
      for (int r = 0; r < kRows; ++r) {
        const V a_rk = broadcast(a[r]);
        for (int v = 0; v < kTileVectors; ++v) sums[r][v] = fma(a_rk, b_k[v], sums[r][v]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kTileVectors; ++v) add_or_store(tile + r * kCols + v * kLanes<V>, sums[r][v], accumulate);
    }
  }
};

// The depths of a block keep its part of a B panel within the first-level cache: 32 to 48 KiB.
using FloatTile = MultiplyAddTile<float, Floats, 384>;
using DoubleTile = MultiplyAddTile<double, Doubles, 192>;

#if defined(WARPLOOM_HAS_AVX512_BF16)

// vdpbf16ps: each float lane gains the products of a pair of bf16.
struct DotTile {
  using Element = bf16;
  using Sum = float;
  using Vector = Floats;
  using Session = NoSession;
  static constexpr int kRows = kTileRows, kCols = kTileVectors * kWidth, kPanel = kCols;
  static constexpr int kGroupA = 2, kGroupB = 2, kDepth = 2;
  static constexpr int kRowsPerBlock = 112, kDepthPerBlock = 768, kDepthPacked = 768;
  static constexpr int64_t kSizeOfBlockB = 768 * 768;
  template <class A>
  static constexpr bool kReadsRows = false;

  template <class Pending>
  static void run(int64_t depth, const LeftPanel<bf16>& left, const bf16* b, int64_t, float* tile, bool accumulate,
                  Pending& pending) {
    pending.finish_rows(kRows);
    multiply(depth, left.data, b, tile, accumulate);
  }

 private:
  static __attribute__((noinline)) void multiply(int64_t depth, const bf16* a, const bf16* b, float* tile,
                                                 bool accumulate) {
    Floats sums[kRows][kTileVectors] = {};
    for (int64_t k = 0; k < depth; k += 2, a += 2 * kRows, b += 2 * kCols) {
      __m512i b_k[kTileVectors];
      for (int v = 0; v < kTileVectors; ++v) b_k[v] = _mm512_loadu_si512(b + v * 2 * kWidth);
      for (int r = 0; r < kRows; ++r) {
        int32_t pair;
        memcpy(&pair, a + 2 * r, sizeof pair);
        const __m512i a_rk = _mm512_set1_epi32(pair);
        for (int v = 0; v < kTileVectors; ++v) {
          sums[r][v] = _mm512_dpbf16_ps(sums[r][v], (__m512bh)a_rk, (__m512bh)b_k[v]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kTileVectors; ++v) add_or_store(tile + r * kCols + v * kWidth, sums[r][v], accumulate);
    }
  }
};

#endif

#if defined(WARPLOOM_HAS_AMX)

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// Not a local variable: GCC 12 takes the instruction to read its first 8 bytes only, and may drop or move the stores of
// the others.
static constexpr TileConfig kTileConfig{};

// Tile registers: 0 to 3 hold the 2 x 2 tiles of C, 4 and 5 those of A, 6 and 7 those of B.
struct AmxTile {
  using Element = bf16;
  using Sum = float;
  using Vector = Floats;
  static constexpr int kRows = 32, kCols = 32, kPanel = 16;
  static constexpr int kGroupA = 32, kGroupB = 2, kDepth = 32;
  static constexpr int kRowsPerBlock = 256, kDepthPerBlock = 1536, kDepthPacked = 512;
  static constexpr int64_t kSizeOfBlockB = 170 * 1536;
  template <class A>
  static constexpr bool kReadsRows = A::kAlongK && sizeof(typename A::T) == sizeof(bf16);

  // The tile configuration of the thread, which other libraries set for themselves too. Released at the end, since
  // a thread with live tiles saves 8 KiB more at each switch.
  struct Session {
    Session() { _tile_loadconfig(&kTileConfig); }
    ~Session() { _tile_release(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
  };

  // A step takes 64 cycles of the matrix unit, during which `pending` has the vector units to itself.
  template <class Pending>
  static void run(int64_t depth, const LeftPanel<bf16>& left, const bf16* b, int64_t panel_stride, float* tile,
                  bool accumulate, Pending& pending) {
    constexpr int kTileStride = kCols * sizeof(float);
    asm volatile("" ::: "memory");  // the compiler is not told that tile loads read what was packed before
    if (accumulate) {
      _tile_loadd(0, tile, kTileStride);
      _tile_loadd(1, tile + 16, kTileStride);
      _tile_loadd(2, tile + 16 * kCols, kTileStride);
      _tile_loadd(3, tile + 16 * kCols + 16, kTileStride);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    const int64_t row_bytes = left.row_stride * sizeof(bf16);
    const bf16 *a = left.data, *a_low = left.data + 16 * left.row_stride, *b_right = b + panel_stride;
    const int steps = static_cast<int>(depth / kDepth);
    for (int step = 0; step < steps; ++step) {
      _tile_loadd(6, b, 64);
      _tile_loadd(4, a, row_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b_right, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a_low, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      a += left.step_stride;
      a_low += left.step_stride;
      b += kDepth * kPanel;
      b_right += kDepth * kPanel;
      pending.finish_rows(kRows * (step + 1) / steps);
    }
    pending.finish_rows(kRows);
    _tile_stored(0, tile, kTileStride);
    _tile_stored(1, tile + 16, kTileStride);
    _tile_stored(2, tile + 16 * kCols, kTileStride);
    _tile_stored(3, tile + 16 * kCols + 16, kTileStride);
  }
};

#endif

// The micro-kernel for operands of type T: 16-bit types without instructions of their own are packed as floats.
template <class T>
struct TileOf {
  using type = FloatTile;
};
template <>
struct TileOf<double> {
  using type = DoubleTile;
};
#if defined(WARPLOOM_HAS_AMX)
template <>
struct TileOf<bf16> {
  using type = AmxTile;
};
#elif defined(WARPLOOM_HAS_AVX512_BF16)
template <>
struct TileOf<bf16> {
  using type = DotTile;
};
#endif

}  // namespace warploom::cpu::WARPLOOM_LEVEL
