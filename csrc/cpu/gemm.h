// C = A * B with an epilogue: B packed into panels beforehand, A as it lies or packed on the way, sums in float (double
// for double).
//
// C is cut into blocks of rows and columns, the units of parallel work. A block goes through k in ranges, so that its
// parts of A and B stay in the second-level cache; sums that wait for the next range rest in scratch memory as whole
// tiles. A finished tile's epilogue runs in slices between the steps of the next tile: the matrix unit and the vector
// units then work at the same time. The cut of k depends on the shape alone, so results are the same for any number of
// threads.
#pragma once

#include "common/parallel.h"
#include "cpu/gemm_pack.h"
#include "cpu/gemm_tiles.h"

namespace warploom::cpu::WARPLOOM_LEVEL {

constexpr int64_t round_up_to(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// The right operand of a product, K by N, packed: whole panels of Tile::kPanel columns, as many as whole tiles take.
template <class T>
struct RightPanels {
  using Tile = typename TileOf<T>::type;
  using Element = typename Tile::Element;
  const Element* data;
  int64_t N, K;

  static int64_t panel_size(int64_t K) { return Tile::kPanel * round_up_to(K, Tile::kDepth); }
  static int64_t num_panels(int64_t N) { return round_up_to(N, Tile::kCols) / Tile::kPanel; }
  static int64_t size(int64_t N, int64_t K) { return num_panels(N) * panel_size(K); }
};

// Packs the whole of b into panels, RightPanels<T>::size(b.P, b.K) elements.
template <class T, class B>
static RightPanels<T> pack_right_operand(const B& b, typename RightPanels<T>::Element* panels) {
  using Tile = typename TileOf<T>::type;
  // In stretches of what lies contiguous: panels if that is k, else k.
  constexpr int64_t kPanelsAtOnce = 4, kDepthAtOnce = 256;
  const int64_t count = RightPanels<T>::num_panels(b.P), panel_size = RightPanels<T>::panel_size(b.K);
  const auto pack = [&](int64_t first, int64_t last, int64_t k_begin, int64_t k_end) {
    pack_panels<Tile::kPanel, Tile::kGroupB, Tile::kDepth>(b, first * Tile::kPanel, last - first, k_begin, k_end,
                                                           panels + first * panel_size + k_begin * Tile::kPanel,
                                                           panel_size, static_cast<typename Tile::Sum*>(nullptr));
  };
  if (B::kAlongK) {
    parallel_for((count + kPanelsAtOnce - 1) / kPanelsAtOnce, [&](int64_t block) {
      pack(block * kPanelsAtOnce, smaller((block + 1) * kPanelsAtOnce, count), 0, b.K);
    });
  } else {
    parallel_for((b.K + kDepthAtOnce - 1) / kDepthAtOnce, [&](int64_t block) {
      pack(0, count, block * kDepthAtOnce, smaller((block + 1) * kDepthAtOnce, b.K));
    });
  }
  return {panels, b.P, b.K};
}

// Fetches part `share` of `shares` of rows [m, m + rows) of A into the second-level cache: read as tiles, rows arrive
// in an order that the processor does not foresee.
template <class A>
WARPLOOM_INLINE void fetch_share(const A& a, int64_t m, int64_t rows, int64_t k, int64_t depth, int64_t share,
                                 int64_t shares) {
  constexpr int64_t kLine = 64 / sizeof(typename A::T);
  for (int64_t row = rows * share / shares; row < rows * (share + 1) / shares; ++row) {
    const auto* data = a.data + (m + row) * a.stride + k;
    for (int64_t at = 0; at < depth; at += kLine) __builtin_prefetch(data + at, 0, 2);
  }
}

// Stores vectors of neighbouring lanes to p, aligned to 64 bytes, without reading their cache lines first or leaving
// them in the caches, where the level can. Before another thread reads them, fence_past_caches.
template <class T, class V, int count>
WARPLOOM_INLINE void store_past_caches(T* p, const V (&v)[count]) {
  for (int i = 0; i < count; ++i) store(p + i * static_cast<int>(sizeof(V) / sizeof(v[0][0])), v[i]);
}
#if defined(WARPLOOM_HAS_AVX512)
template <int count>
WARPLOOM_INLINE void store_past_caches(float* p, const Floats (&v)[count]) {
  for (int i = 0; i < count; ++i) _mm512_stream_ps(p + i * kWidth, v[i]);
}
template <class Half>
WARPLOOM_INLINE void store_pair_past_caches(Half* p, Floats low, Floats high) {
  const __m512i line = _mm512_castsi256_si512(narrow(Half{}, low));
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), _mm512_inserti64x4(line, narrow(Half{}, high), 1));
}
WARPLOOM_INLINE void store_past_caches(bf16* p, const Floats (&v)[2]) { store_pair_past_caches(p, v[0], v[1]); }
WARPLOOM_INLINE void store_past_caches(fp16* p, const Floats (&v)[2]) { store_pair_past_caches(p, v[0], v[1]); }
WARPLOOM_INLINE void fence_past_caches() { _mm_sfence(); }
#else
WARPLOOM_INLINE void fence_past_caches() {}
#endif

// Where a product goes that an epilogue has finished: row m at data + m * stride.
template <class T>
struct ResultRows {
  static constexpr bool kStores = true;
  T* data;
  int64_t stride;
  // A result that no cache keeps until it is read is written past the caches: a store into them reads the line first.
  // (4096 x 384 x 1536 in bf16, followed by the product that reads the result: 0.87 of the time.)
  bool past_caches;

  ResultRows(T* data, int64_t rows, int64_t stride)
      : data(data),
        stride(stride),
        past_caches(rows * stride * static_cast<int64_t>(sizeof(T)) >= kLeastPastCaches &&
                    stride * static_cast<int64_t>(sizeof(T)) % 64 == 0 && reinterpret_cast<uintptr_t>(data) % 64 == 0) {
  }

  // The same rows from column n on.
  ResultRows from_column(int64_t n) const {
    ResultRows part = *this;
    part.data += n;
    part.past_caches = past_caches && reinterpret_cast<uintptr_t>(part.data) % 64 == 0;
    return part;
  }

  template <class V, class Count>
  WARPLOOM_INLINE void put(int64_t m, int64_t n, V v, Count lanes) const {
    store(data + m * stride + n, v, lanes);
  }
  template <class V, int count>
  WARPLOOM_INLINE void put_whole(int64_t m, int64_t n, const V (&v)[count]) const {
    T* row = data + m * stride + n;
    if (past_caches) return store_past_caches(row, v);
    for (int i = 0; i < count; ++i) store(row + i * kLanes<V>, v[i]);
  }

 private:
  static constexpr int64_t kLeastPastCaches = 2 << 20;  // a second-level cache
};

// For epilogues that leave nothing to store.
struct NoResult {
  static constexpr bool kStores = false, past_caches = false;
  NoResult from_column(int64_t) const { return {}; }
};

// The epilogue of one tile, a slice of rows at a time.
template <class Tile, class Result, class Epilogue>
struct PendingTile {
  const Result& result;
  const Epilogue& epilogue;
  const typename Tile::Sum* tile = nullptr;
  int64_t m = 0, n = 0;
  int rows = 0, cols = 0, next_row = 0;
  using V = typename Tile::Vector;

  WARPLOOM_INLINE void finish_rows(int end) {
    // Copies, since the compiler must assume that a store of the epilogue changes whatever memory can reach.
    const Epilogue finish = epilogue;
    const Result out = result;
    const auto* sums = tile;
    const int64_t first_row = m, first_column = n;
    const int columns = cols, last = end < rows ? end : rows;
    int row = next_row;
    next_row = last > row ? last : row;
    for (; row < last; ++row) {
      const auto* row_sums = sums + row * Tile::kCols;
      const int64_t m = first_row + row;
      if (columns == Tile::kCols) {
        constexpr int kVectors = Tile::kCols / kLanes<V>;
        if constexpr (Result::kStores) {
          V finished[kVectors];
          for (int i = 0; i < kVectors; ++i) {
            const int j = i * kLanes<V>;
            finished[i] = finish(m, first_column + j, load(row_sums + j), All{});
          }
          out.put_whole(m, first_column, finished);
        } else {
          for (int j = 0; j < Tile::kCols; j += kLanes<V>) finish(m, first_column + j, load(row_sums + j), All{});
        }
      } else {
        each_vector<V>(columns, [&](int64_t j, auto lanes) {
          const int64_t n = first_column + j;
          if constexpr (Result::kStores) {
            out.put(m, n, finish(m, n, load(row_sums + j), lanes), lanes);
          } else {
            finish(m, n, load(row_sums + j), lanes);
          }
        });
      }
    }
  }
};

// How a product goes through its depth K.
template <class T, class A>
struct DepthRanges {
  using Tile = typename TileOf<T>::type;
  // Shorter where A is packed, so that a block is wide and its part of A is packed for many columns.
  static constexpr int64_t kMost = Tile::template kReadsRows<A> ? Tile::kDepthPerBlock : Tile::kDepthPacked;

  // Of about equal length; one empty range if there is no k, since C must still be written.
  static int64_t count(int64_t K) { return K > kMost ? (K + kMost - 1) / kMost : 1; }
  static int64_t length(int64_t K) { return round_up_to((K + count(K) - 1) / count(K), Tile::kDepth); }
  // Tiles of a block's columns: as many as the cache has room for at ranges of this length.
  static int64_t tiles_per_block(int64_t length) {
    return larger(Tile::kSizeOfBlockB / larger(length, 1) / Tile::kCols, 1);
  }
};

// C = the sum over i < count of as[i] * bs[i]: products that end in one sum never wait in memory for one another. P of
// all as is M, as[i].K is bs[i].K. epilogue(m, n, v, lanes) receives the sums of row m from column n on, as one vector,
// exactly once per element, and returns what `result` is to store of them, or does with them what there is to do if
// that is NoResult; it holds what it needs by value. a_sums: null, or M numbers that receive the sums of A's rows over
// k, for an A that does not lie along k.
template <class T, class A, class Result, class Epilogue>
static void gemm_sum(const A* as, const RightPanels<T>* bs, int count, const Result& result, const Epilogue& epilogue,
                     typename Accumulator<T>::type* a_sums = nullptr) {
  using Tile = typename TileOf<T>::type;
  using Element = typename Tile::Element;
  using Sum = typename Tile::Sum;
  constexpr int kRows = Tile::kRows, kCols = Tile::kCols, kDepth = Tile::kDepth;
  constexpr int64_t kPanelsOfA = Tile::kRowsPerBlock / kRows;
  const int64_t M = as[0].P, N = bs[0].N;

  using Depths = DepthRanges<T, A>;
  int64_t ranges = 0, longest = 0;
  for (int i = 0; i < count; ++i) {
    ranges += Depths::count(as[i].K);
    longest = larger(longest, Depths::length(as[i].K));
  }
  const int64_t tiles_n = (N + kCols - 1) / kCols, tiles_wide = Depths::tiles_per_block(longest);
  const int64_t blocks_n = (tiles_n + tiles_wide - 1) / tiles_wide, panels_m = (M + kRows - 1) / kRows;
  // Few blocks are cut finer until all threads get equally many: a larger block reads less for each product, but nobody
  // gains by waiting. An element's sum does not depend on the block it is in.
  const int64_t threads = thread_count();
  int64_t blocks_m = (panels_m + kPanelsOfA - 1) / kPanelsOfA;
  while (blocks_m < panels_m && blocks_m * blocks_n < 4 * threads && blocks_m * blocks_n % threads != 0) ++blocks_m;

  parallel_for(blocks_m * blocks_n, [&](int64_t block) {
    const int64_t block_m = block % blocks_m, block_n = block / blocks_m;
    const int64_t first_panel = panels_m * block_m / blocks_m, m_begin = first_panel * kRows;
    const int64_t panels_a = panels_m * (block_m + 1) / blocks_m - first_panel;
    const int64_t tile_begin = tiles_n * block_n / blocks_n, tile_end = tiles_n * (block_n + 1) / blocks_n;
    Element* packed_a = scratch<Element>(4, kPanelsOfA * kRows * longest);
    // Two in turn where no sums wait: one is computed while the other leaves.
    Sum* tiles = scratch<Sum>(5, (ranges > 1 ? tiles_wide * kPanelsOfA : 2) * kRows * kCols);
    Sum row_sums[kPanelsOfA * kRows] = {};
    typename Tile::Session session;
    PendingTile<Tile, Result, Epilogue> pending{result, epilogue};
    int64_t turn = 0, product = 0, k_end = 0;

    for (int64_t r = 0; r < ranges; ++r) {
      // The next range of this product, or the first of the next.
      if (r > 0 && k_end == as[product].K) ++product, k_end = 0;
      const A& a = as[product];
      const RightPanels<T>& b = bs[product];
      const int64_t K = a.K, panel_b = RightPanels<T>::panel_size(K), k_begin = k_end;
      k_end = smaller(k_begin + Depths::length(K), K);
      const int64_t depth = round_up_to(k_end - k_begin, kDepth);
      // Whole panels are read as they lie where the tile can, others are packed.
      const int64_t whole = Tile::template kReadsRows<A> && k_begin + depth <= K ? (M - m_begin) / kRows : 0;
      const int64_t first_packed = smaller(whole, panels_a);
      if (first_packed < panels_a) {
        pack_panels<kRows, Tile::kGroupA, kDepth>(
            a, m_begin + first_packed * kRows, panels_a - first_packed, k_begin, k_end,
            packed_a + first_packed * kRows * depth, kRows * depth,
            a_sums != nullptr && block_n == 0 ? row_sums + first_packed * kRows : static_cast<Sum*>(nullptr));
      }
      for (int64_t i = 0; i < panels_a; ++i) {
        const int64_t m = m_begin + i * kRows;
        LeftPanel<Element> left{packed_a + i * kRows * depth, Tile::kGroupA, kRows * Tile::kGroupA};
        if constexpr (Tile::template kReadsRows<A>) {
          if (i < first_packed) left = {a.data + m * a.stride + k_begin, a.stride, kDepth};
        }
        const bool fetches = i + 1 < first_packed;
        for (int64_t t = tile_begin; t < tile_end; ++t) {
          if constexpr (Tile::template kReadsRows<A>) {
            if (fetches) fetch_share(a, m + kRows, kRows, k_begin, depth, t - tile_begin, tile_end - tile_begin);
          }
          const Element* right = b.data + t * (kCols / Tile::kPanel) * panel_b + k_begin * Tile::kPanel;
          const int64_t place = ranges > 1 ? (t - tile_begin)* kPanelsOfA + i : turn ^= 1;
          Sum* tile = tiles + place * kRows * kCols;
          Tile::run(depth, left, right, panel_b, tile, r > 0, pending);
          if (r + 1 < ranges) continue;
          pending.tile = tile;
          pending.m = m;
          pending.n = t * kCols;
          pending.rows = static_cast<int>(M - m < kRows ? M - m : kRows);
          pending.cols = static_cast<int>(N - pending.n < kCols ? N - pending.n : kCols);
          pending.next_row = 0;
        }
      }
    }
    pending.finish_rows(kRows);
    if (result.past_caches) fence_past_caches();
    if (a_sums != nullptr && block_n == 0) {
      const int64_t rows = smaller(M - m_begin, panels_a * kRows);
      memcpy(a_sums + m_begin, row_sums, static_cast<uint64_t>(rows) * sizeof(Sum));
    }
  });
}

// C = a * b; see gemm_sum.
template <class T, class A, class Result, class Epilogue>
static void gemm(const A& a, const RightPanels<T>& b, const Result& result, const Epilogue& epilogue,
                 typename Accumulator<T>::type* a_sums = nullptr) {
  gemm_sum(&a, &b, 1, result, epilogue, a_sums);
}

// An epilogue that leaves the sums as they are.
struct AsTheyAre {
  template <class V, class Count>
  WARPLOOM_INLINE V operator()(int64_t, int64_t, V v, Count) const {
    return v;
  }
};

}  // namespace warploom::cpu::WARPLOOM_LEVEL
