// The rows of layer_norm (kCenter) and rms_norm, which differ by the mean alone: with mean 0 and no dbias they are one.
// Each row is read from memory once; the passes after the first find it in the cache. What is read or written is
// prefetched in the first pass that has the time, which reaches into the rows that follow.
#pragma once

#include "common/parallel.h"
#include "common/simd.h"
#include "cpu/norm.h"

namespace warploom::cpu::WARPLOOM_LEVEL {

// The sum of a vector's lanes over C, in double: once a row it costs little, and what a row has in common must not be
// the place where its digits are lost.
template <class V>
WARPLOOM_INLINE double mean_of(V v, int64_t C) {
  double lanes[kLanes<V>];
  for (int i = 0; i < kLanes<V>; ++i) lanes[i] = v[i];
  for (int half = kLanes<V> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0] / static_cast<double>(C);
}

template <bool kCenter, class T>
WARPLOOM_INLINE void norm_fwd_row(const NormForward<T>& args, int64_t row) {
  using V = typename VectorOf<T>::type;
  using Scalar = typename Accumulator<T>::type;
  const int64_t C = args.C;
  const T* x = args.x + row * C;

  V total = {};
  if (args.residual != nullptr) {
    const T* residual = args.residual + row * C;
    T* stream = args.stream + row * C;
    each_vector<V>(C, [&](int64_t i, auto n) {
      prefetch_ahead(x + i);
      prefetch_ahead(residual + i);
      prefetch_ahead(stream + i);
      store(stream + i, load(x + i, n) + load(residual + i, n), n);
      if constexpr (kCenter) total += load(stream + i, n);
    });
    x = stream;  // from here on as rounded, since the backward pass will see it so
  } else if constexpr (kCenter) {
    each_vector<V>(C, [&](int64_t i, auto n) {
      prefetch_ahead(x + i);
      total += load(x + i, n);
    });
  }
  double exact_mean = kCenter ? mean_of(total, C) : 0.0;
  const V rough_mean = broadcast(static_cast<Scalar>(exact_mean));

  // The variance from the deviations, not from the sum of squares: a large mean would cancel all its digits. For the
  // same reason the mean of a long row is off by some units in its last place; the deviations' own mean corrects it.
  T* y = args.y + row * C;
  V squares = {};
  total = V{};
  each_vector<V>(C, [&](int64_t i, auto n) {
    prefetch_ahead(y + i);
    if constexpr (!kCenter) prefetch_ahead(x + i);
    const V deviation = keep_first(load(x + i, n) - rough_mean, n);
    squares = fma(deviation, deviation, squares);
    if constexpr (kCenter) total += deviation;
  });
  double variance = mean_of(squares, C);
  if constexpr (kCenter) {
    const double correction = mean_of(total, C);
    exact_mean = static_cast<Scalar>(exact_mean) + correction;
    variance -= correction * correction;
    args.mean[row] = static_cast<Scalar>(exact_mean);
  }
  args.rstd[row] = static_cast<Scalar>(1.0 / __builtin_sqrt(variance + args.eps));

  const V mean = broadcast(static_cast<Scalar>(exact_mean)), rstd = broadcast(args.rstd[row]);
  each_vector<V>(C, [&](int64_t i, auto n) {
    const V scaled = (load(x + i, n) - mean) * rstd * load(args.weight + i, n);
    store(y + i, args.bias == nullptr ? scaled : scaled + load(args.bias + i, n), n);
  });
}

template <bool kCenter, class T>
static void norm_fwd(const NormForward<T>& args) {
  constexpr int64_t kElementsPerBlock = 1 << 14;
  const int64_t rows_per_block = 1 + kElementsPerBlock / args.C;
  parallel_for((args.N + rows_per_block - 1) / rows_per_block, [&](int64_t block) {
    const int64_t end = (block + 1) * rows_per_block;
    for (int64_t row = block * rows_per_block; row < (end < args.N ? end : args.N); ++row) {
      norm_fwd_row<kCenter>(args, row);
    }
  });
}

// Writes the row's dx, and adds its share of dweight and dbias.
template <bool kCenter, class T, class Scalar>
WARPLOOM_INLINE void norm_bwd_row(const NormBackward<T>& args, int64_t row, Scalar* dweight, Scalar* dbias) {
  using V = typename VectorOf<T>::type;
  const int64_t C = args.C;
  const T *x = args.x + row * C, *dy = args.dy + row * C;
  const V mean = broadcast(kCenter ? args.mean[row] : Scalar{0}), rstd = broadcast(args.rstd[row]);

  V along_one = {}, along_x = {};  // the parts of dx_hat that y ignores: they carry no gradient
  each_vector<V>(C, [&](int64_t i, auto n) {
    prefetch_ahead(x + i);
    prefetch_ahead(dy + i);
    const V x_hat = (load(x + i, n) - mean) * rstd, dy_i = load(dy + i, n);
    const V dx_hat = dy_i * load(args.weight + i, n);
    along_x = fma(dx_hat, x_hat, along_x);
    store(dweight + i, fma(dy_i, x_hat, load(dweight + i, n)), n);
    if constexpr (kCenter) {
      along_one += dx_hat;
      store(dbias + i, dy_i + load(dbias + i, n), n);
    }
  });
  along_x = broadcast(static_cast<Scalar>(mean_of(along_x, C)));
  along_one = broadcast(static_cast<Scalar>(mean_of(along_one, C)));

  T* dx = args.dx + row * C;
  const T* dstream = args.dstream == nullptr ? nullptr : args.dstream + row * C;
  each_vector<V>(C, [&](int64_t i, auto n) {
    prefetch_ahead(dx + i);
    if (dstream != nullptr) prefetch_ahead(dstream + i);
    const V x_hat = (load(x + i, n) - mean) * rstd;
    const V dx_hat = load(dy + i, n) * load(args.weight + i, n);
    const V dx_i = rstd * (dx_hat - along_one - x_hat * along_x);
    store(dx + i, dstream == nullptr ? dx_i : dx_i + load(dstream + i, n), n);
  });
}

template <bool kCenter, class T>
static void norm_bwd(const NormBackward<T>& args) {
  using V = typename VectorOf<T>::type;
  using Scalar = typename Accumulator<T>::type;
  constexpr int64_t kMaxBlocks = 128, kMinRows = 64;
  const int64_t N = args.N, C = args.C;
  const int64_t share = (N + kMaxBlocks - 1) / kMaxBlocks;
  const int64_t rows_per_block = share > kMinRows ? share : kMinRows;
  const int64_t blocks = (N + rows_per_block - 1) / rows_per_block;
  // Per block its sums of dweight and dbias, added up in the order of the blocks afterwards.
  Scalar* sums = scratch<Scalar>(0, blocks * 2 * C);  // (blocks, 2, C)
  parallel_for(blocks, [&](int64_t block) {
    Scalar *dweight = sums + block * 2 * C, *dbias = dweight + C;
    memset(dweight, 0, static_cast<uint64_t>(2 * C) * sizeof(Scalar));
    const int64_t end = (block + 1) * rows_per_block;
    for (int64_t row = block * rows_per_block; row < (end < N ? end : N); ++row) {
      norm_bwd_row<kCenter>(args, row, dweight, dbias);
    }
  });
  constexpr int64_t kColumns = 256;
  parallel_for((C + kColumns - 1) / kColumns, [&](int64_t chunk) {
    const int64_t begin = chunk * kColumns, columns = C - begin < kColumns ? C - begin : kColumns;
    each_vector<V>(columns, [&](int64_t i, auto n) {
      V dweight = {}, dbias = {};
      for (int64_t block = 0; block < blocks; ++block) {
        const Scalar* block_sums = sums + block * 2 * C + begin + i;
        dweight += load(block_sums, n);
        if constexpr (kCenter) dbias += load(block_sums + C, n);
      }
      store(args.dweight + begin + i, dweight, n);
      if constexpr (kCenter) store(args.dbias + begin + i, dbias, n);
    });
  });
}

template <bool kCenter>
constexpr NormTable norm_table() {
  return {{norm_fwd<kCenter, float>, norm_bwd<kCenter, float>},
          {norm_fwd<kCenter, double>, norm_bwd<kCenter, double>},
          {norm_fwd<kCenter, bf16>, norm_bwd<kCenter, bf16>},
          {norm_fwd<kCenter, fp16>, norm_bwd<kCenter, fp16>}};
}

}  // namespace warploom::cpu::WARPLOOM_LEVEL
