// Micro-kernels: one kRows x kCols tile of C = A * B, out of a packed panel of A and one of B, all sums in registers.
//
// A panel holds kRows rows of A (or kCols columns of B) for a range of k as [k / group][row][k % group], so that the
// loop over k reads it front to back. The groups are what the instruction eats at once: 1 for multiply-add, 2 for the
// bf16 dot product, 32 for the rows of an AMX tile of A. kDepth is the multiple k is padded to, with zeros.
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

struct NoSession {
  ~NoSession() {}  // not trivial, so that a variable of this type is not unused
};

template <class Scalar, class V, int kMaxDepthOfBlock>
struct MultiplyAddTile {
  using Element = Scalar;  // of the packed panels
  using Sum = Scalar;
  using Vector = V;
  using Session = NoSession;
  static constexpr int kRows = kTileRows, kCols = kTileVectors * kLanes<V>;
  static constexpr int kGroupA = 1, kGroupB = 1, kDepth = 1;
  static constexpr int kRowsPerBlock = 112 / kTileRows * kTileRows, kDepthPerBlock = kMaxDepthOfBlock;

  // tile (kRows, kCols) = a * b over `depth` values of k, plus what tile holds if accumulate.
  static void run(int64_t depth, const Scalar* a, const Scalar* b, Scalar* tile, bool accumulate) {
    V sums[kRows][kTileVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kTileVectors; ++v) sums[r][v] = accumulate ? load(tile + r * kCols + v * kLanes<V>) : V{};
    }
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
      for (int v = 0; v < kTileVectors; ++v) store(tile + r * kCols + v * kLanes<V>, sums[r][v]);
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
  static constexpr int kRows = kTileRows, kCols = kTileVectors * kWidth;
  static constexpr int kGroupA = 2, kGroupB = 2, kDepth = 2;
  static constexpr int kRowsPerBlock = 112, kDepthPerBlock = 768;

  static void run(int64_t depth, const bf16* a, const bf16* b, float* tile, bool accumulate) {
    Floats sums[kRows][kTileVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kTileVectors; ++v) sums[r][v] = accumulate ? load(tile + r * kCols + v * kWidth) : Floats{};
    }
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
      for (int v = 0; v < kTileVectors; ++v) store(tile + r * kCols + v * kWidth, sums[r][v]);
    }
  }
};

#endif

#if defined(WARPLOOM_HAS_AMX)

// Tile registers: 0 to 3 hold the 2 x 2 tiles of C, 4 and 5 those of A, 6 and 7 those of B.
struct AmxTile {
  using Element = bf16;
  using Sum = float;
  using Vector = Floats;
  static constexpr int kRows = 32, kCols = 32;
  static constexpr int kGroupA = 32, kGroupB = 2, kDepth = 32;
  static constexpr int kRowsPerBlock = 128, kDepthPerBlock = 512;

  // The tile configuration of the thread, which other libraries set for themselves too. Released at the end, since
  // a thread with live tiles saves 8 KiB more at each switch.
  struct Session {
    Session() {
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } config;
      _tile_loadconfig(&config);
    }
    ~Session() { _tile_release(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
  };

  static void run(int64_t depth, const bf16* a, const bf16* b, float* tile, bool accumulate) {
    constexpr int kTileStride = kCols * sizeof(float), kStrideA = 64, kStrideB = 2 * kCols * sizeof(bf16);
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
    for (int64_t k = 0; k < depth; k += 32, a += 32 * kRows, b += 32 * kCols) {
      _tile_loadd(6, b, kStrideB);
      _tile_loadd(7, b + 32, kStrideB);
      _tile_loadd(4, a, kStrideA);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + 16 * 32, kStrideA);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
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
