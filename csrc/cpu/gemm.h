// C = A * B^T with an epilogue: both operands packed into panels, one micro-kernel, sums in float (double for double).
//
// Who holds what: B is packed whole, once, and shared. C is cut into blocks of rows and columns, the units of parallel
// work; each packs its part of A, a range of k at a time, so that this part stays in the second-level cache while the
// panels of B pass through the first-level one. Sums that wait for the next range of k rest in scratch memory as whole
// tiles. The cut depends on the shape alone, so results are the same for any number of threads.
#pragma once

#include "common/parallel.h"
#include "cpu/gemm_pack.h"
#include "cpu/gemm_tiles.h"

namespace warploom::cpu::WARPLOOM_LEVEL {

// a.P is M, b.P is N. epilogue(m, n, v, lanes) receives the sums of row m from column n on, as one vector, exactly once
// per element, and stores what becomes of them. a_sums: null, or M numbers that receive the sums of A's rows over k.
template <class A, class B, class Epilogue>
static void gemm(const A& a, const B& b, Epilogue&& epilogue,
                 typename Accumulator<typename A::T>::type* a_sums = nullptr) {
  using T = typename A::T;
  using Tile = typename TileOf<T>::type;
  using Element = typename Tile::Element;
  using Sum = typename Tile::Sum;
  constexpr int kRows = Tile::kRows, kCols = Tile::kCols, kDepth = Tile::kDepth;
  constexpr int64_t kColsPerBlock = 768, kPanelsOfA = Tile::kRowsPerBlock / kRows;
  const int64_t M = a.P, N = b.P, K = a.K;

  // Ranges of k of about equal length; one empty range if there is no k, since C must still be written.
  const int64_t most = Tile::kDepthPerBlock, ranges = K > most ? (K + most - 1) / most : 1;
  const int64_t range = ((K + ranges - 1) / ranges + kDepth - 1) / kDepth * kDepth;
  const int64_t padded_k = (K + kDepth - 1) / kDepth * kDepth;

  const int64_t panels_b = (N + kCols - 1) / kCols;
  Element* packed_b = scratch<Element>(0, panels_b * kCols * padded_k);
  parallel_for(panels_b, [&](int64_t panel) {
    pack_panel<kCols, Tile::kGroupB, kDepth>(b, panel * kCols, 0, K, packed_b + panel * kCols * padded_k,
                                             static_cast<Sum*>(nullptr));
  });

  const int64_t blocks_m = (M + Tile::kRowsPerBlock - 1) / Tile::kRowsPerBlock;
  const int64_t blocks_n = (N + kColsPerBlock - 1) / kColsPerBlock;
  constexpr int64_t kPanelsPerBlock = kColsPerBlock / kCols;
  parallel_for(blocks_m * blocks_n, [&](int64_t block) {
    const int64_t block_m = block % blocks_m, block_n = block / blocks_m, m_begin = block_m * Tile::kRowsPerBlock;
    const int64_t panels_left = (M - m_begin + kRows - 1) / kRows;
    const int64_t panels_a = panels_left < kPanelsOfA ? panels_left : kPanelsOfA;
    const int64_t panel_begin = block_n * kPanelsPerBlock;
    const int64_t panel_end = panel_begin + kPanelsPerBlock < panels_b ? panel_begin + kPanelsPerBlock : panels_b;
    Element* packed_a = scratch<Element>(4, kPanelsOfA * kRows * range);
    Sum* tiles = scratch<Sum>(5, (ranges > 1 ? kPanelsPerBlock * kPanelsOfA : 1) * kRows * kCols);
    Sum row_sums[kPanelsOfA * kRows] = {};
    typename Tile::Session session;

    for (int64_t r = 0; r < ranges; ++r) {
      const int64_t k_begin = r * range, k_end = r + 1 < ranges ? k_begin + range : K;
      const int64_t depth = (k_end - k_begin + kDepth - 1) / kDepth * kDepth;
      for (int64_t i = 0; i < panels_a; ++i) {
        pack_panel<kRows, Tile::kGroupA, kDepth>(
            a, m_begin + i * kRows, k_begin, k_end, packed_a + i * kRows * depth,
            a_sums != nullptr && block_n == 0 ? row_sums + i * kRows : static_cast<Sum*>(nullptr));
      }
      for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
        const Element* panel_b = packed_b + (panel * padded_k + k_begin) * kCols;
        for (int64_t i = 0; i < panels_a; ++i) {
          Sum* tile = tiles + (ranges > 1 ? ((panel - panel_begin) * kPanelsOfA + i) * kRows * kCols : 0);
          Tile::run(depth, packed_a + i * kRows * depth, panel_b, tile, r > 0);
          if (r + 1 < ranges) continue;
          const int64_t m = m_begin + i * kRows, n = panel * kCols;
          const int64_t rows = M - m < kRows ? M - m : kRows, cols = N - n < kCols ? N - n : kCols;
          for (int64_t row = 0; row < rows; ++row) {
            each_vector<typename Tile::Vector>(
                cols, [&](int64_t j, auto lanes) { epilogue(m + row, n + j, load(tile + row * kCols + j), lanes); });
          }
        }
      }
    }
    if (a_sums != nullptr && block_n == 0) {
      const int64_t rows = M - m_begin < Tile::kRowsPerBlock ? M - m_begin : Tile::kRowsPerBlock;
      memcpy(a_sums + m_begin, row_sums, static_cast<uint64_t>(rows) * sizeof(Sum));
    }
  });
}

}  // namespace warploom::cpu::WARPLOOM_LEVEL
