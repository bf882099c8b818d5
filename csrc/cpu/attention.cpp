#include "cpu/attention.h"

#include "common/parallel.h"
#include "common/simd.h"
#include "cpu/attention_tiles.h"

namespace warploom::cpu::WARPLOOM_LEVEL {
namespace {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr double kInfinity = __builtin_inf();

constexpr int kForwardQueries = 64, kForwardKeys = 128;
constexpr int kBackwardQueries = 64, kBackwardKeys = 64;

// Pieces of one block of scratch memory. Over address 0 it only counts.
class Arena {
 public:
  explicit Arena(void* memory) : start_(reinterpret_cast<uintptr_t>(memory)), next_(start_) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }

  int64_t bytes() const { return next_ - start_; }

 private:
  uintptr_t start_, next_;
};

// Layout(arena, sizes...) takes its pieces from the arena.
template <class Layout, class... Sizes>
Layout layout_in_scratch(int slot, Sizes... sizes) {
  Arena counting(nullptr);
  Layout{counting, sizes...};
  Arena arena(scratch_bytes(slot, counting.bytes()));
  return Layout{arena, sizes...};
}

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// How many keys, from the first on, the query sees.
int64_t visible_keys(const AttentionSequence& sequence, int64_t query) {
  return larger(0, smaller(sequence.seen_keys, query + 1 + sequence.diagonal));
}

// 2^x for probabilities that will be stored as E; 0 for -inf.
template <class E>
WARPLOOM_INLINE Floats two_to(Floats x) {
#if defined(WARPLOOM_HAS_AVX512)
  // Needs no clamping: the fraction of an infinity is 0, and scaling by 2^floor(x) takes care of the rest. Minimax for
  // the relative error on [0, 1): 7.5e-8, or 2.6e-6 where bf16 rounds to 2e-3 anyway.
  constexpr int kFraction = 0x09;  // x - floor(x), without exceptions
  const Floats part = _mm512_reduce_ps(x, kFraction);
  Floats p;
  if constexpr (kSame<E, bf16>) {
    p = fma(broadcast(0.013534167781472206f), part, broadcast(0.05201146006584167f));
    p = fma(p, part, broadcast(0.2414427548646927f));
    p = fma(p, part, broadcast(0.6930038332939148f));
    p = fma(p, part, broadcast(1.0000026226043701f));
  } else {
    p = fma(broadcast(0.0018775766948238015f), part, broadcast(0.00898933969438076f));
    p = fma(p, part, broadcast(0.05582631751894951f));
    p = fma(p, part, broadcast(0.24015361070632935f));
    p = fma(p, part, broadcast(0.6931530833244324f));
    p = fma(p, part, broadcast(0.9999999403953552f));
  }
  return _mm512_scalef_ps(p, x);
#else
  return exp2(x);
#endif
}
template <class E>
WARPLOOM_INLINE Doubles two_to(Doubles x) {
  for (int i = 0; i < kLanes<Doubles>; ++i) x[i] = __builtin_exp2(x[i]);
  return x;
}

// Of a row's scores, hides those outside [first, last), by whole vectors: narrower stores would stall the loads of the
// softmax that follow.
template <class V, class S>
WARPLOOM_INLINE void hide_outside(S* s, int64_t first, int64_t last, int64_t count) {
  V lane;
  for (int i = 0; i < kLanes<V>; ++i) lane[i] = i;
  for (int64_t i = 0; i < count; i += kLanes<V>) {
    if (first <= i && i + kLanes<V> <= last) continue;
    const V position = lane + broadcast(static_cast<S>(i));
    const auto seen = (position >= broadcast(static_cast<S>(first))) & (position < broadcast(static_cast<S>(last)));
    store(s + i, seen ? load(s + i) : broadcast(static_cast<S>(-kInfinity)));
  }
}

WARPLOOM_INLINE float log(float x) { return __builtin_logf(x); }
WARPLOOM_INLINE double log(double x) { return __builtin_log(x); }

template <class V>
WARPLOOM_INLINE auto row_max(V v) {
#if defined(WARPLOOM_HAS_AVX512)
  if constexpr (kSame<V, Floats>) return _mm512_reduce_max_ps(v);
#endif
  auto best = v[0];
  for (int i = 1; i < kLanes<V>; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

template <class T, class S>
void store_scaled(const S* row, S factor, int64_t count, T* out) {
  each_vector<Lanes<T>>(count, [&](int64_t i, auto n) { store(out + i, load(row + i, n) * factor, n); });
}

template <class T>
void store_zeros(T* out, int64_t count) {
  memset(out, 0, count * sizeof(T));
}

// Calls body(first element of the bias row) with the row's element type.
template <class T, class Body>
WARPLOOM_INLINE void with_bias_row(const AttentionBias& bias, int64_t head, int64_t query, Body&& body) {
  const int64_t offset = (bias.heads == 1 ? 0 : head) * bias.h_stride + query * bias.row_stride;
  if constexpr (!kSame<T, double>) {
    if (bias.is_float) return body(static_cast<const float*>(bias.data) + offset);
  }
  body(static_cast<const T*>(bias.data) + offset);
}

// What scores are multiplied by, in powers of two. The softmax takes the factor along in its own multiply-add, unless
// something has to be done to the scaled scores before it: then a pass of its own scales, and the factor left is 1.
// (The softmax looks for the largest score before scaling, so a factor below zero needs that pass too.)
template <class S>
struct ScoreScale {
  S scale, left;
  bool apart;

  ScoreScale(double softmax_scale, const AttentionBias& bias)
      : scale(static_cast<S>(softmax_scale * kLog2E)),
        left(scale),
        apart(bias.data != nullptr || !(softmax_scale > 0)) {
    if (apart) left = 1;
  }
};

// ---- Forward ----

template <class T>
struct ForwardLayout {
  using E = Element<T>;
  using S = Sum<T>;
  E *keys, *values, *queries, *p, *buffer;
  S *s, *o, *row_best, *row_sums;

  ForwardLayout() = default;
  // keys: a multiple of kDepthStep. width: D as a product's depth, columns: as its number of columns.
  ForwardLayout(Arena& arena, int64_t keys_padded, int64_t width, int64_t columns)
      : keys(arena.take<E>(keys_padded * width)),
        values(arena.take<E>(keys_padded * columns)),
        queries(arena.take<E>(kForwardQueries * width)),
        p(arena.take<E>(kForwardQueries * kForwardKeys)),
        buffer(arena.take<E>(kPanel * width)),
        s(arena.take<S>(kForwardQueries * kForwardKeys)),
        o(arena.take<S>(kForwardQueries * columns)),
        row_best(arena.take<S>(kForwardQueries)),
        row_sums(arena.take<S>(kForwardQueries * kLanes<Lanes<T>>)) {}
};

// One key/value head of one sequence against blocks of query rows of the heads that share it.
template <class T>
class ForwardPass {
  using E = Element<T>;
  using S = Sum<T>;
  using V = Lanes<T>;
  static constexpr int kStrip = kDepthStep<E>;

 public:
  ForwardPass(const AttentionForward<T>& args, const AttentionSequence& sequence, int64_t kv_head)
      : args_(args),
        sequence_(sequence),
        kv_head_(kv_head),
        group_(args.problem.H / args.problem.H_kv),
        D_(args.problem.D),
        width_(round_up(D_, kDepthStep<E>)),
        columns_(round_up(D_, kPanel)),
        scale_(args.problem.softmax_scale, args.bias) {}

  // Blocks are counted over the heads of the group; block b of n per head is rows from b % n * kForwardQueries on.
  void run(int64_t first_block, int64_t last_block, int64_t blocks_per_head) {
    int64_t keys = 0;
    for (int64_t block = first_block; block < last_block; ++block) {
      keys = larger(keys, visible_keys(sequence_, last_query(block % blocks_per_head)));
    }
    keys_padded_ = round_up(keys, kDepthStep<E>);
    tile_ = layout_in_scratch<ForwardLayout<T>>(4, keys_padded_, width_, columns_);
    const T* k = args_.k.row(sequence_.b, kv_head_, sequence_.first_key);
    const T* v = args_.v.row(sequence_.b, kv_head_, sequence_.first_key);
    pack_right_transposed(k, args_.k.t_stride, keys, D_, keys_padded_, width_, tile_.keys, tile_.buffer);
    pack_right(v, args_.v.t_stride, keys, D_, keys_padded_, tile_.values, keys_padded_ * kPanel, tile_.buffer);
    const ProductSession<T> session;
    for (int64_t block = first_block; block < last_block; ++block) {
      attend(kv_head_ * group_ + block / blocks_per_head, block % blocks_per_head);
    }
  }

 private:
  int64_t last_query(int64_t block) const { return smaller((block + 1) * kForwardQueries, sequence_.num_queries) - 1; }

  void attend(int64_t head, int64_t block) {
    const int64_t first = block * kForwardQueries, rows = last_query(block) + 1 - first;
    const int64_t padded_rows = round_up(rows, kRowStep<E>);
    const int64_t keys = visible_keys(sequence_, last_query(block));
    pack_left(args_.q.row(sequence_.b, head, sequence_.first_query + first), args_.q.t_stride, rows, D_, padded_rows,
              width_, tile_.queries);
    for (int64_t r = 0; r < rows; ++r) {
      tile_.row_best[r] = -kInfinity;
      store(tile_.row_sums + r * kLanes<V>, V{});
    }
    for (int64_t key = 0; key < keys; key += kForwardKeys) {
      // Along the diagonal in strips of rows, each with only the keys that its last row sees.
      const bool masked = visible_keys(sequence_, first) < key + round_up(smaller(kForwardKeys, keys - key), kStrip);
      const int64_t strip = masked ? kStrip : kForwardQueries;
      for (int64_t row = 0; row < rows; row += strip) {
        const int64_t strip_rows = smaller(strip, rows - row);
        const int64_t seen = smaller(kForwardKeys, visible_keys(sequence_, first + row + strip_rows - 1) - key);
        if (seen > 0) attend_keys(head, first, row, strip_rows, key, seen, masked);
      }
    }
    finish(head, first, rows, keys > 0);
  }

  // Rows [row, row + rows) of the block against keys [key, key + seen).
  void attend_keys(int64_t head, int64_t first, int64_t row, int64_t rows, int64_t key, int64_t seen, bool masked) {
    const int64_t padded_rows = round_up(rows, kRowStep<E>), padded = round_up(seen, kDepthStep<E>);
    S *s = tile_.s + row * kForwardKeys, *o = tile_.o + row * columns_;
    E* p = tile_.p + row * kForwardKeys;
    product<false>(padded_rows, padded, width_, tile_.queries + row * width_, width_, tile_.keys + key * width_,
                   kPanel * width_, s, kForwardKeys);
    if (scale_.apart) scale_apart(head, first + row, rows, key, seen, padded, s);
    for (int64_t r = 0; masked && r < rows; ++r) {
      hide_outside<V>(s + r * kForwardKeys, 0, visible_keys(sequence_, first + row + r) - key, padded);
    }
    softmax(row, rows, padded, key > 0);
    const E* values = tile_.values + key * kPanel;
    const int64_t values_panel = keys_padded_ * kPanel;
    if (key == 0) {
      product<false>(padded_rows, columns_, padded, p, kForwardKeys, values, values_panel, o, columns_);
    } else {
      product<true>(padded_rows, columns_, padded, p, kForwardKeys, values, values_panel, o, columns_);
    }
  }

  void scale_apart(int64_t head, int64_t first, int64_t rows, int64_t key, int64_t seen, int64_t padded, S* scores) {
    const V scale = broadcast(scale_.scale), to_log2 = broadcast(static_cast<S>(kLog2E));
    for (int64_t r = 0; r < rows; ++r) {
      S* s = scores + r * kForwardKeys;
      each_vector<V>(padded, [&](int64_t i, auto n) { store(s + i, load(s + i, n) * scale, n); });
      if (args_.bias.data == nullptr) continue;
      with_bias_row<T>(args_.bias, head, first + r, [&](const auto* bias) {
        each_vector<V>(
            seen, [&](int64_t i, auto n) { store(s + i, fma(load(bias + key + i, n), to_log2, load(s + i, n)), n); });
      });
    }
  }

  // Scores to probabilities of the rows' largest score so far, to which o and the sums are brought down.
  void softmax(int64_t row, int64_t rows, int64_t padded, bool has_o) {
    const V scale = broadcast(scale_.left);
    for (int64_t r = row; r < row + rows; ++r) {
      const S* s = tile_.s + r * kForwardKeys;
      E* p = tile_.p + r * kForwardKeys;
      S* row_sums = tile_.row_sums + r * kLanes<V>;
      V best_lanes = load(s);
      for (int64_t i = kLanes<V>; i < padded; i += kLanes<V>) best_lanes = max(best_lanes, load(s + i));
      const S before = tile_.row_best[r], found = row_max(best_lanes) * scale_.left;
      V sums = load(row_sums);
      S best = before;
      if (found > before) {
        best = tile_.row_best[r] = found;
        if (has_o) {
          const V shrink = two_to<E>(broadcast(before - best));
          S* o = tile_.o + r * columns_;
          for (int64_t d = 0; d < columns_; d += kLanes<V>) store(o + d, load(o + d) * shrink);
          sums *= shrink;
        }
      }
      // A row that has seen nothing yet keeps -inf, and -inf - -inf is NaN.
      const V shift = broadcast(best == static_cast<S>(-kInfinity) ? S(0) : -best);
      for (int64_t i = 0; i < padded; i += kLanes<V>) {
        const V value = two_to<E>(fma(load(s + i), scale, shift));
        sums += value;
        store(p + i, value);
      }
      store(row_sums, sums);
    }
  }

  void finish(int64_t head, int64_t first, int64_t rows, bool has_o) {
    const int64_t query = sequence_.first_query + first;
    S* lse = args_.lse + (sequence_.b * args_.problem.H + head) * args_.problem.T + query;
    for (int64_t r = 0; r < rows; ++r) {
      T* o = args_.o.row(sequence_.b, head, query + r);
      const S total = sum(load(tile_.row_sums + r * kLanes<V>));
      if (!has_o || total == 0) {
        store_zeros(o, D_);
        lse[r] = -kInfinity;
      } else {
        store_scaled(tile_.o + r * columns_, 1 / total, D_, o);
        lse[r] = tile_.row_best[r] * static_cast<S>(kLn2) + log(total);
      }
    }
  }

  const AttentionForward<T>& args_;
  const AttentionSequence& sequence_;
  int64_t kv_head_, group_, D_, width_, columns_, keys_padded_ = 0;
  ScoreScale<S> scale_;
  ForwardLayout<T> tile_{};
};

template <class T>
void attention_fwd(const AttentionForward<T>& args) {
  const AttentionProblem& problem = args.problem;
  // Enough items to keep the threads busy to the end, each as large as that allows, since each packs its own keys.
  // A row's result does not depend on the cut.
  const int64_t heads = problem.num_sequences * problem.H_kv;
  const int64_t chunks = heads == 0 ? 0 : (4 * thread_count() + heads - 1) / heads;
  parallel_for(heads * chunks, [&](int64_t item) {
    const AttentionSequence& sequence = problem.sequences[item / (problem.H_kv * chunks)];
    const int64_t per_head = (sequence.num_queries + kForwardQueries - 1) / kForwardQueries;
    const int64_t blocks = problem.H / problem.H_kv * per_head, chunk = item % chunks;
    const int64_t first = blocks * chunk / chunks, last = blocks * (chunk + 1) / chunks;
    if (first < last) ForwardPass<T>(args, sequence, item / chunks % problem.H_kv).run(first, last, per_head);
  });
}

// ---- Backward ----

template <class T>
struct BackwardLayout {
  using E = Element<T>;
  using S = Sum<T>;
  // Once per key/value head. keys, values: (keys, width), keys_turned: (columns, keys); left operands.
  E *keys, *values, *keys_turned;
  S *dk, *dv;  // (keys, columns)
  // Once per block of query rows; right operands. turned: the depth runs over D.
  E *queries, *queries_turned, *d_o, *d_o_turned;
  S *row_lse, *row_delta;
  S *dq_turned, *dq;  // (columns, kBackwardQueries), (kBackwardQueries, columns)
  // Once per block of keys, all (kBackwardKeys, kBackwardQueries). ds_right: as right operand.
  S *s, *dp, *bias;
  E *p, *ds, *ds_right;
  E* buffer;

  BackwardLayout() = default;
  BackwardLayout(Arena& arena, int64_t keys_padded, int64_t width, int64_t columns, bool has_bias)
      : keys(arena.take<E>(keys_padded * width)),
        values(arena.take<E>(keys_padded * width)),
        keys_turned(arena.take<E>(keys_padded * columns)),
        dk(arena.take<S>(keys_padded * columns)),
        dv(arena.take<S>(keys_padded * columns)),
        queries(arena.take<E>(kBackwardQueries * columns)),
        queries_turned(arena.take<E>(kBackwardQueries * width)),
        d_o(arena.take<E>(kBackwardQueries * columns)),
        d_o_turned(arena.take<E>(kBackwardQueries * width)),
        row_lse(arena.take<S>(kBackwardQueries)),
        row_delta(arena.take<S>(kBackwardQueries)),
        dq_turned(arena.take<S>(kBackwardQueries * columns)),
        dq(arena.take<S>(kBackwardQueries * columns)),
        s(arena.take<S>(kBackwardKeys * kBackwardQueries)),
        dp(arena.take<S>(kBackwardKeys * kBackwardQueries)),
        bias(arena.take<S>(has_bias ? kBackwardKeys * kBackwardQueries : 0)),
        p(arena.take<E>(kBackwardKeys * kBackwardQueries)),
        ds(arena.take<E>(kBackwardKeys * kBackwardQueries)),
        ds_right(arena.take<E>(kBackwardKeys * kBackwardQueries)),
        buffer(arena.take<E>(larger(kPanel * width, (kPanel + 1) * kGroup<E> * columns))) {}
};

#if defined(WARPLOOM_HAS_AVX512_BF16)
// Two rows of floats as one step of a panel of pairs.
WARPLOOM_INLINE void store_rows_as_group(const Floats* rows, bf16* out) {
  const __m512i low_then_high = (__m512i)_mm512_cvtne2ps_pbh(rows[1], rows[0]);
  alignas(64) static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                           21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), low_then_high));
}
#endif
template <class V, class E>
WARPLOOM_INLINE void store_rows_as_group(const V* rows, E* out) {
  store(out, rows[0]);
}

// Sums of ds^T over the batch: (H, columns, rows) of the bias, both padded.
template <class S>
struct TurnedBias {
  S* data;  // null: not wanted
  int64_t columns, rows;

  S* at(int64_t head, int64_t column) const { return data + (head * columns + column) * rows; }
};

// dk and dv of one key/value head of one sequence from blocks of query rows, and dq of those. Scores are computed
// transposed, keys by queries, so that p^T and ds^T are left operands as they come.
template <class T>
class BackwardPass {
  using E = Element<T>;
  using S = Sum<T>;
  using V = Lanes<T>;
  static constexpr int kStrip = kDepthStep<E>;
  static constexpr int64_t kQueryPanel = kBackwardQueries * kPanel;

 public:
  BackwardPass(const AttentionBackward<T>& args, const AttentionSequence& sequence, int64_t kv_head,
               const TurnedBias<S>& dbias)
      : args_(args),
        sequence_(sequence),
        kv_head_(kv_head),
        group_(args.problem.H / args.problem.H_kv),
        D_(args.problem.D),
        width_(round_up(D_, kDepthStep<E>)),
        columns_(round_up(D_, kPanel)),
        keys_padded_(round_up(sequence.num_keys, kDepthStep<E>)),
        scale_(args.problem.softmax_scale, args.bias),
        dbias_(dbias),
        tile_(layout_in_scratch<BackwardLayout<T>>(4, keys_padded_, width_, columns_, args.bias.data != nullptr)) {}

  // Sums the dk and dv of the blocks (counted as in ForwardPass), without dk's factor, into scratch memory that lasts
  // until this thread's next pass, or into `sums` if that is given.
  void run(int64_t first_block, int64_t last_block, int64_t blocks_per_head, S* sums = nullptr) {
    if (sums != nullptr) {
      tile_.dk = sums;
      tile_.dv = sums + keys_padded_ * columns_;
    }
    const T* k = args_.k.row(sequence_.b, kv_head_, sequence_.first_key);
    const T* v = args_.v.row(sequence_.b, kv_head_, sequence_.first_key);
    const int64_t seen = sequence_.seen_keys;
    pack_left(k, args_.k.t_stride, seen, D_, keys_padded_, width_, tile_.keys);
    pack_left(v, args_.v.t_stride, seen, D_, keys_padded_, width_, tile_.values);
    pack_left_transposed(k, args_.k.t_stride, seen, D_, keys_padded_, tile_.keys_turned, tile_.buffer);
    store_zeros(tile_.dk, keys_padded_ * columns_);
    store_zeros(tile_.dv, keys_padded_ * columns_);
    const ProductSession<T> session;
    for (int64_t block = first_block; block < last_block; ++block) {
      attend(kv_head_ * group_ + block / blocks_per_head, block % blocks_per_head);
    }
  }

  const S* dk() const { return tile_.dk; }
  const S* dv() const { return tile_.dv; }

 private:
  void attend(int64_t head, int64_t block) {
    const int64_t first = block * kBackwardQueries;
    const int64_t rows = smaller(kBackwardQueries, sequence_.num_queries - first);
    const int64_t padded_rows = round_up(rows, kDepthStep<E>);
    const int64_t query = sequence_.first_query + first;
    const int64_t keys = visible_keys(sequence_, first + rows - 1);
    const T* q = args_.q.row(sequence_.b, head, query);
    const T* d_o = args_.d_o.row(sequence_.b, head, query);
    const int64_t q_stride = args_.q.t_stride, d_o_stride = args_.d_o.t_stride;
    pack_right(q, q_stride, rows, D_, padded_rows, tile_.queries, kQueryPanel, tile_.buffer);
    pack_right(d_o, d_o_stride, rows, D_, padded_rows, tile_.d_o, kQueryPanel, tile_.buffer);
    pack_right_transposed(q, q_stride, rows, D_, padded_rows, width_, tile_.queries_turned, tile_.buffer);
    pack_right_transposed(d_o, d_o_stride, rows, D_, padded_rows, width_, tile_.d_o_turned, tile_.buffer);
    gather_row_statistics(head, query, rows, padded_rows);
    store_zeros(tile_.dq_turned, columns_ * kBackwardQueries);

    for (int64_t key = 0; key < keys; key += kBackwardKeys) attend_keys(head, first, rows, key, keys);
    store_dq(head, query, rows);
  }

  // The block of query rows against keys [key, smaller(key + kBackwardKeys, keys)).
  void attend_keys(int64_t head, int64_t first, int64_t rows, int64_t key, int64_t keys) {
    const int64_t there = smaller(kBackwardKeys, keys - key), padded = round_up(there, kStrip);
    const int64_t columns = round_up(rows, kStrip);
    // Along the diagonal in strips of keys, each with only the queries from the first one on that sees a key of it.
    const bool masked = visible_keys(sequence_, first) < key + padded;
    const int64_t strip = masked ? kStrip : padded;
    for (int64_t row = 0; row < padded; row += strip) {
      const int64_t from = larger(0, key + row - sequence_.diagonal - first) / kStrip * kStrip;
      if (from < columns) attend_strip(head, first, rows, key + row, row, strip, there - row, from, masked);
    }
    if (!masked) {
      add_dq(key, padded, 0, columns);
      return;
    }
    for (int64_t column = 0; column < columns; column += kStrip) {
      const int64_t seen = smaller(there, visible_keys(sequence_, first + column + kStrip - 1) - key);
      if (seen > 0) add_dq(key, round_up(seen, kStrip), column, kStrip);
    }
  }

  // Keys [key, key + strip), at rows [row, row + strip) of the block of keys, against the queries from `from` on: what
  // they give to dk, dv and dbias, and ds for dq. `there` of the keys are not padding.
  void attend_strip(int64_t head, int64_t first, int64_t rows, int64_t key, int64_t row, int64_t strip, int64_t there,
                    int64_t from, bool masked) {
    const int64_t columns = round_up(rows, kStrip) - from, at = row * kBackwardQueries + from;
    product<false>(strip, columns, width_, tile_.keys + key * width_, width_, tile_.queries_turned + from * width_,
                   kPanel * width_, tile_.s + at, kBackwardQueries);
    product<false>(strip, columns, width_, tile_.values + key * width_, width_, tile_.d_o_turned + from * width_,
                   kPanel * width_, tile_.dp + at, kBackwardQueries);
    if (scale_.apart) scale_apart(head, first + from, rows - from, key, there, strip, columns, tile_.s + at);
    for (int64_t r = 0; masked && r < strip; ++r) {
      const int64_t sees = r < there ? key + r - sequence_.diagonal - first - from : columns;
      hide_outside<V>(tile_.s + at + r * kBackwardQueries, sees, columns, columns);
    }
    to_score_gradients(row, strip, from, columns,
                       dbias_.data == nullptr ? nullptr : dbias_.at(head, key) + first + from);
    product<true>(strip, columns_, columns, tile_.p + at, kBackwardQueries, tile_.d_o + from * kPanel, kQueryPanel,
                  tile_.dv + key * columns_, columns_);
    product<true>(strip, columns_, columns, tile_.ds + at, kBackwardQueries, tile_.queries + from * kPanel, kQueryPanel,
                  tile_.dk + key * columns_, columns_);
  }

  // dq^T of queries [column, column + count) += k^T ds^T over `seen` keys.
  void add_dq(int64_t key, int64_t seen, int64_t column, int64_t count) {
    product<true>(columns_, count, seen, tile_.keys_turned + key, keys_padded_, tile_.ds_right + column * kBackwardKeys,
                  kBackwardKeys * kPanel, tile_.dq_turned + column, kBackwardQueries);
  }

  void gather_row_statistics(int64_t head, int64_t query, int64_t rows, int64_t padded_rows) {
    const S* lse = args_.lse + (sequence_.b * args_.problem.H + head) * args_.problem.T + query;
    for (int64_t r = 0; r < padded_rows; ++r) {
      // +inf makes every probability of the row zero: the row sees nothing, or is padding.
      const bool blind = r >= rows || lse[r] == static_cast<S>(-kInfinity);
      tile_.row_lse[r] = blind ? static_cast<S>(kInfinity) : lse[r] * static_cast<S>(kLog2E);
      tile_.row_delta[r] = 0;
      if (r >= rows) continue;
      const T* o = args_.o.row(sequence_.b, head, query + r);
      const T* d_o = args_.d_o.row(sequence_.b, head, query + r);
      V products = {};
      each_vector<V>(D_, [&](int64_t i, auto n) { products = fma(load(o + i, n), load(d_o + i, n), products); });
      tile_.row_delta[r] = sum(products);
    }
  }

  void scale_apart(int64_t head, int64_t first, int64_t rows, int64_t key, int64_t there, int64_t strip,
                   int64_t columns, S* scores) {
    if (args_.bias.data != nullptr) {
      for (int64_t i = 0; i < rows; ++i) {
        with_bias_row<T>(args_.bias, head, first + i, [&](const auto* bias) {
          for (int64_t r = 0; r < smaller(there, strip); ++r) {
            tile_.bias[r * kBackwardQueries + i] = to_float(bias[key + r]);
          }
        });
      }
    }
    const V scale = broadcast(scale_.scale), to_log2 = broadcast(static_cast<S>(kLog2E));
    for (int64_t r = 0; r < strip; ++r) {
      S* s = scores + r * kBackwardQueries;
      const S* bias = tile_.bias + r * kBackwardQueries;
      each_vector<V>(columns, [&](int64_t i, auto n) { store(s + i, load(s + i, n) * scale, n); });
      if (args_.bias.data == nullptr || r >= there) continue;
      each_vector<V>(rows,
                     [&](int64_t i, auto n) { store(s + i, fma(load(bias + i, n), to_log2, load(s + i, n)), n); });
    }
  }

  // From s^T and dp^T of a strip of keys: p^T, ds^T as left and as right operand, and dbias^T += ds^T.
  void to_score_gradients(int64_t row, int64_t strip, int64_t from, int64_t columns, S* dbias) {
    constexpr int lanes = kLanes<V>;
    const V scale = broadcast(scale_.left);
    for (int64_t r = row; r < row + strip; r += kGroup<E>) {
      for (int64_t i = from; i < from + columns; i += lanes) {
        const V lse = load(tile_.row_lse + i), delta = load(tile_.row_delta + i);
        V group[kGroup<E>];
        for (int g = 0; g < kGroup<E>; ++g) {
          const int64_t at = (r + g) * kBackwardQueries + i;
          const V p = two_to<E>(fma(load(tile_.s + at), scale, -lse));
          const V ds = p * (load(tile_.dp + at) - delta);
          store(tile_.p + at, p);
          store(tile_.ds + at, ds);
          group[g] = ds;
          if (dbias != nullptr) {
            S* sums = dbias + (r - row + g) * dbias_.rows + i - from;
            store(sums, load(sums) + ds);
          }
        }
        store_rows_as_group(group, tile_.ds_right + i / kPanel * (kBackwardKeys * kPanel) + r * kPanel + i % kPanel);
      }
    }
  }

  void store_dq(int64_t head, int64_t query, int64_t rows) {
    using U = typename UnitOf<sizeof(S)>::type;
    for (int64_t d = 0; d < columns_; d += kPanel) {
      const U* sources[kPanel];
      for (int i = 0; i < kPanel; ++i) {
        sources[i] = reinterpret_cast<const U*>(tile_.dq_turned + (d + i) * kBackwardQueries);
      }
      transpose_16_rows(sources, kBackwardQueries, reinterpret_cast<U*>(tile_.dq + d), columns_);
    }
    const S factor = static_cast<S>(args_.problem.softmax_scale);
    for (int64_t r = 0; r < rows; ++r) {
      store_scaled(tile_.dq + r * columns_, factor, D_, args_.dq.row(sequence_.b, head, query + r));
    }
  }

  const AttentionBackward<T>& args_;
  const AttentionSequence& sequence_;
  int64_t kv_head_, group_, D_, width_, columns_, keys_padded_;
  ScoreScale<S> scale_;
  TurnedBias<S> dbias_;
  BackwardLayout<T> tile_;
};

// From sums of (keys, D padded).
template <class T>
void store_dk_dv(const AttentionBackward<T>& args, const AttentionSequence& sequence, int64_t kv_head, const Sum<T>* dk,
                 const Sum<T>* dv) {
  const int64_t D = args.problem.D, columns = round_up(D, kPanel);
  const Sum<T> factor = static_cast<Sum<T>>(args.problem.softmax_scale);
  for (int64_t key = 0; key < sequence.num_keys; ++key) {
    const int64_t t = sequence.first_key + key;
    store_scaled(dk + key * columns, factor, D, args.dk.row(sequence.b, kv_head, t));
    store_scaled(dv + key * columns, Sum<T>(1), D, args.dv.row(sequence.b, kv_head, t));
  }
}

// dbias = the turned sums, rounded once; summed over the heads in order if they share one bias.
template <class B, class S>
void store_dbias(const TurnedBias<S>& sums, int64_t H, int64_t heads, int64_t rows, int64_t columns, B* dbias) {
  const int64_t blocks = (rows + kPanel - 1) / kPanel, heads_per_bias = H / heads;
  parallel_for(heads * blocks, [&](int64_t item) {
    const int64_t first_head = item / blocks * heads_per_bias, first_row = item % blocks * kPanel;
    for (int64_t column = 0; column < columns; ++column) {
      S total[kPanel] = {};
      for (int64_t head = first_head; head < first_head + heads_per_bias; ++head) {
        for (int i = 0; i < kPanel; ++i) total[i] += sums.at(head, column)[first_row + i];
      }
      for (int64_t i = 0; i < smaller(kPanel, rows - first_row); ++i) {
        from_float(total[i], dbias + (item / blocks * rows + first_row + i) * columns + column);
      }
    }
  });
}

template <class T>
void backward_with_bias(const AttentionBackward<T>& args) {
  using S = Sum<T>;
  const AttentionProblem& problem = args.problem;
  constexpr int step = kDepthStep<Element<T>>;
  TurnedBias<S> dbias{nullptr, round_up(args.bias_columns, step), round_up(args.bias_rows, step)};
  const int64_t per_head = dbias.columns * dbias.rows;
  dbias.data = scratch<S>(0, problem.H * per_head);
  // A head's sums run over the sequences in order, so the heads are all there is to do in parallel.
  parallel_for(problem.H_kv, [&](int64_t kv_head) {
    const int64_t group = problem.H / problem.H_kv;
    store_zeros(dbias.at(kv_head * group, 0), group * per_head);
    for (int64_t n = 0; n < problem.num_sequences; ++n) {
      const AttentionSequence& sequence = problem.sequences[n];
      const int64_t blocks = (sequence.num_queries + kBackwardQueries - 1) / kBackwardQueries;
      BackwardPass<T> pass(args, sequence, kv_head, dbias);
      pass.run(0, group * blocks, blocks);
      store_dk_dv(args, sequence, kv_head, pass.dk(), pass.dv());
    }
  });
  if (args.bias.is_float) {
    store_dbias(dbias, problem.H, args.bias.heads, args.bias_rows, args.bias_columns, static_cast<float*>(args.dbias));
  } else {
    store_dbias(dbias, problem.H, args.bias.heads, args.bias_rows, args.bias_columns, static_cast<T*>(args.dbias));
  }
}

// Each head of each sequence in `splits` parts, whose dk and dv are then added in order.
template <class T>
void backward_in_splits(const AttentionBackward<T>& args, int64_t splits, int64_t most_keys) {
  using S = Sum<T>;
  const AttentionProblem& problem = args.problem;
  const int64_t heads = problem.num_sequences * problem.H_kv, columns = round_up(problem.D, kPanel);
  const auto padded = [](int64_t keys) { return round_up(keys, kDepthStep<Element<T>>); };
  const int64_t part = 2 * padded(most_keys) * columns;
  S* sums = scratch<S>(0, heads * splits * part);
  parallel_for(heads * splits, [&](int64_t item) {
    const int64_t head = item / splits, split = item % splits;
    const AttentionSequence& sequence = problem.sequences[head / problem.H_kv];
    const int64_t per_head = (sequence.num_queries + kBackwardQueries - 1) / kBackwardQueries;
    const int64_t blocks = problem.H / problem.H_kv * per_head;
    BackwardPass<T>(args, sequence, head % problem.H_kv, {})
        .run(blocks * split / splits, blocks * (split + 1) / splits, per_head, sums + item * part);
  });
  parallel_for(heads, [&](int64_t head) {
    const AttentionSequence& sequence = problem.sequences[head / problem.H_kv];
    const int64_t half = padded(sequence.num_keys) * columns;
    S* total = sums + head * splits * part;
    for (int64_t split = 1; split < splits; ++split) {
      const S* more = total + split * part;
      each_vector<Lanes<T>>(2 * half,
                            [&](int64_t i, auto n) { store(total + i, load(total + i, n) + load(more + i, n), n); });
    }
    store_dk_dv(args, sequence, head % problem.H_kv, total, total + half);
  });
}

template <class T>
void attention_bwd(const AttentionBackward<T>& args) {
  if (args.bias.data != nullptr) return backward_with_bias(args);
  const AttentionProblem& problem = args.problem;
  const int64_t heads = problem.num_sequences * problem.H_kv, group = problem.H / problem.H_kv;
  int64_t most_queries = 0, most_keys = 0;
  for (int64_t n = 0; n < problem.num_sequences; ++n) {
    most_queries = larger(most_queries, problem.sequences[n].num_queries);
    most_keys = larger(most_keys, problem.sequences[n].num_keys);
  }
  // Too few heads for the processors are split by query rows. Not below 256: each part goes through all keys.
  const int64_t wanted = heads == 0 ? 1 : (2 * args.parallelism + heads - 1) / heads;
  const int64_t splits = smaller(wanted, group * most_queries / 256);
  if (splits > 1) return backward_in_splits(args, splits, most_keys);
  parallel_for(heads, [&](int64_t head) {
    const AttentionSequence& sequence = problem.sequences[head / problem.H_kv];
    const int64_t blocks = (sequence.num_queries + kBackwardQueries - 1) / kBackwardQueries;
    BackwardPass<T> pass(args, sequence, head % problem.H_kv, {});
    pass.run(0, group * blocks, blocks);
    store_dk_dv(args, sequence, head % problem.H_kv, pass.dk(), pass.dv());
  });
}

template <class T>
constexpr AttentionKernels<T> kKernels = {attention_fwd<T>, attention_bwd<T>};

}  // namespace

extern const AttentionTable attention = {kKernels<float>, kKernels<double>, kKernels<bf16>, kKernels<fp16>};

}  // namespace warploom::cpu::WARPLOOM_LEVEL
