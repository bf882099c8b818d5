// Forward and backward together, and long for it: they share the diagonals, the scaling, the biases and the tiles.
#include "cpu/attention.h"

#include "common/parallel.h"
#include "common/simd.h"
#include "cpu/attention_tiles.h"

namespace warploom::cpu::WARPLOOM_LEVEL {
namespace {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr double kInfinity = __builtin_inf();

constexpr int kForwardQueries = 128, kForwardKeys = 128, kForwardStrip = 32;
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

constexpr int64_t round_down(int64_t count, int64_t step) { return count / step * step; }

// The keys that a query sees: [first_seen, end_seen), none if that is empty. Both rise with the query.
int64_t first_seen(const AttentionSequence& sequence, int64_t query) {
  return larger(0, query + sequence.first_diagonal);
}
int64_t end_seen(const AttentionSequence& sequence, int64_t query) {
  return larger(0, smaller(sequence.seen_keys, query + 1 + sequence.last_diagonal));
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
  const auto hide = [&](int64_t i) {
    const V position = lane + broadcast(static_cast<S>(i));
    const auto seen = (position >= broadcast(static_cast<S>(first))) & (position < broadcast(static_cast<S>(last)));
    store(s + i, seen ? load(s + i) : broadcast(static_cast<S>(-kInfinity)));
  };
  for (int64_t i = 0; i < smaller(first, count); i += kLanes<V>) hide(i);
  for (int64_t i = round_down(larger(0, last), kLanes<V>); i < count; i += kLanes<V>) hide(i);
}

WARPLOOM_INLINE float log(float x) { return __builtin_logf(x); }
WARPLOOM_INLINE double log(double x) { return __builtin_log(x); }

// Not so if any lane is NaN.
template <class V>
WARPLOOM_INLINE bool all_below(V v, decltype(V{}[0] + 0) bound) {
#if defined(WARPLOOM_HAS_AVX512)
  if constexpr (kSame<V, Floats>) return _mm512_cmp_ps_mask(v, broadcast(bound), _CMP_NLT_UQ) == 0;
#endif
  const auto below = v < broadcast(bound);
  bool all = true;
  for (int i = 0; i < kLanes<V>; ++i) all &= below[i] != 0;
  return all;
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
  const int64_t offset = (bias.heads == 1 ? 0 : head) * bias.h_stride + bias.offset + query * bias.row_stride;
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

// What is subtracted from a row's scores is the largest of its first ones. It is raised only where a lane's
// exponentials over a block of keys sum to this or more, so that most rows never search for their largest score again.
constexpr int kMostSum = 1024;

template <class T>
struct ForwardLayout {
  using E = Element<T>;
  using S = Sum<T>;
  E *keys, *values, *queries, *p, *buffer;
  S *wide_queries, *s, *o, *row_shift, *row_sums;
  bool* row_is_shifted;

  ForwardLayout() = default;
  // keys: a multiple of kDepthStep. width: D as a product's depth, columns: as its number of columns.
  // rows_in_place: of which the product is made without packing.
  ForwardLayout(Arena& arena, int64_t keys_padded, int64_t width, int64_t columns, int64_t rows_in_place)
      : keys(arena.take<E>(keys_padded * width)),
        values(arena.take<E>(keys_padded * columns)),
        queries(arena.take<E>(kForwardQueries * width)),
        p(arena.take<E>(kForwardStrip * kForwardKeys)),
        buffer(arena.take<E>(kPanel * width)),
        wide_queries(arena.take<S>(rows_in_place * columns)),
        s(arena.take<S>(kForwardStrip * kForwardKeys)),
        o(arena.take<S>(kForwardQueries * columns)),
        row_shift(arena.take<S>(kForwardQueries)),
        row_sums(arena.take<S>(kForwardQueries * kLanes<Lanes<T>>)),
        row_is_shifted(arena.take<bool>(kForwardQueries)) {}
};

// One key/value head of one sequence against blocks of query rows of the heads that share it.
template <class T>
class ForwardPass {
  using E = Element<T>;
  using S = Sum<T>;
  using V = Lanes<T>;

  // Rows [row, row + rows) of the block against keys [key, key + seen).
  struct Tile {
    int64_t row, rows, key, seen;
    bool first;  // of these rows
    bool whole;  // every row sees every key, and the keys fill a step of a product's depth
    int64_t columns() const { return round_up(seen, kDepthStep<E>); }
  };

 public:
  ForwardPass(const AttentionForward<T>& args, const AttentionSequence& sequence, int64_t kv_head)
      : args_(args),
        sequence_(sequence),
        kv_head_(kv_head),
        group_(args.problem.H / args.problem.H_kv),
        D_(args.problem.D),
        width_(round_up(D_, kDepthStep<E>)),
        columns_(round_up(D_, kPanel)),
        in_place_(group_ * sequence.num_queries <= kMostRowsInPlace),
        scale_(args.problem.softmax_scale, args.bias) {}

  // Blocks are counted over the heads of the group; block b of n per head is rows from b % n * kForwardQueries on.
  void run(int64_t first_block, int64_t last_block, int64_t blocks_per_head) {
    int64_t end = 0;
    first_key_ = sequence_.num_keys;
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t first = block % blocks_per_head * kForwardQueries;
      first_key_ = smaller(first_key_, round_down(first_seen(sequence_, first), kDepthStep<E>));
      end = larger(end, end_seen(sequence_, last_query(first)));
    }
    const int64_t keys = larger(0, end - first_key_);
    keys_padded_ = round_up(keys, kDepthStep<E>);
    tile_ = layout_in_scratch<ForwardLayout<T>>(4, in_place_ ? 0 : keys_padded_, width_, columns_,
                                                in_place_ ? sequence_.num_queries : 0);
    if (!in_place_) {
      pack_right_transposed(key_row(args_.k, first_key_), args_.k.t_stride, keys, D_, keys_padded_, width_, tile_.keys,
                            tile_.buffer);
      pack_right(key_row(args_.v, first_key_), args_.v.t_stride, keys, D_, keys_padded_, tile_.values,
                 keys_padded_ * kPanel, tile_.buffer);
    }
    const ProductSession<T> session;
    for (int64_t block = first_block; block < last_block; ++block) {
      attend(kv_head_ * group_ + block / blocks_per_head, block % blocks_per_head * kForwardQueries);
    }
  }

 private:
  // Up to so many query rows per key/value head are multiplied with keys and values as they lie in memory: what packing
  // those saves then is less than it costs (measured over 1024 keys of 64 numbers).
  static constexpr int kMostRowsInPlace = kSame<E, bf16> ? 1 : 3;

  int64_t last_query(int64_t first) const { return smaller(first + kForwardQueries, sequence_.num_queries) - 1; }

  const T* key_row(const HeadsOf<const T>& heads, int64_t key) const {
    return heads.row(sequence_.b, kv_head_, sequence_.first_key + key);
  }
  // Queries from `first` on.
  void attend(int64_t head, int64_t first) {
    head_ = head;
    first_ = first;
    const int64_t rows = last_query(first) + 1 - first;
    const T* q = args_.q.row(sequence_.b, head, sequence_.first_query + first);
    if (in_place_) {
      for (int64_t r = 0; r < rows; ++r) {
        each_vector<V>(D_, [&](int64_t d, auto n) {
          store(tile_.wide_queries + r * columns_ + d, load(q + r * args_.q.t_stride + d, n));
        });
      }
    } else {
      pack_left(q, args_.q.t_stride, rows, D_, round_up(rows, kRowStep<E>), width_, tile_.queries);
    }
    for (int64_t r = 0; r < rows; ++r) {
      tile_.row_is_shifted[r] = false;
      tile_.row_shift[r] = 0;
      store(tile_.row_sums + r * kLanes<V>, V{});
    }
    const int64_t end = end_seen(sequence_, first + rows - 1);
    // Key blocks on the outside: the rows' strips then find them in the nearest cache.
    for (int64_t key = round_down(first_seen(sequence_, first), kForwardKeys); key < end; key += kForwardKeys) {
      for (int64_t row = 0; row < rows; row += kForwardStrip) {
        const int64_t strip_rows = smaller(kForwardStrip, rows - row), last = first + row + strip_rows - 1;
        const int64_t start = round_down(first_seen(sequence_, first + row), kDepthStep<E>), from = larger(key, start);
        const int64_t seen = smaller(key + kForwardKeys, end_seen(sequence_, last)) - from;
        if (seen <= 0) continue;
        const bool whole = first_seen(sequence_, last) <= from &&
                           end_seen(sequence_, first + row) >= from + round_up(seen, kDepthStep<E>);
        attend_tile({row, strip_rows, from, seen, from == start, whole});
      }
    }
    finish(rows);
  }

  void attend_tile(const Tile& tile) {
    const int64_t padded_rows = round_up(tile.rows, kRowStep<E>), key = tile.key - first_key_;
    if (in_place_) {
      scores_in_place(tile);
    } else {
      product<false>(padded_rows, tile.columns(), width_, tile_.queries + tile.row * width_, width_,
                     tile_.keys + key * width_, kPanel * width_, tile_.s, kForwardKeys);
    }
    if (scale_.apart || !tile.whole) complete_scores(tile);
    if (tile.first) shift_all(tile);
    for (int64_t r = 0; r < tile.rows; ++r) softmax(tile, r);
    S* o = tile_.o + tile.row * columns_;
    const E* values = tile_.values + key * kPanel;
    const int64_t values_panel = keys_padded_ * kPanel;
    if (in_place_) {
      output_in_place(tile);
    } else if (tile.first) {
      product<false>(padded_rows, columns_, tile.columns(), tile_.p, kForwardKeys, values, values_panel, o, columns_);
    } else {
      product<true>(padded_rows, columns_, tile.columns(), tile_.p, kForwardKeys, values, values_panel, o, columns_);
    }
  }

  void scores_in_place(const Tile& tile) {
    const int64_t stride = args_.k.t_stride;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const S* q = tile_.wide_queries + (tile.row + r) * columns_;
      for (int64_t c = 0; c < tile.columns(); c += kLanes<V>) {
        V products[kLanes<V>] = {};
        const T* k = key_row(args_.k, tile.key + c);
        const int count = static_cast<int>(smaller(kLanes<V>, tile.seen - c));
        for (int i = 0; i < count; ++i, k += stride) {
          V sum{};
          each_vector<V>(D_, [&](int64_t d, auto n) { sum = fma(load(q + d), load(k + d, n), sum); });
          products[i] = sum;
        }
        transpose(products);
        V sums{};
        for (int i = 0; i < kLanes<V>; ++i) sums += products[i];
        store(tile_.s + r * kForwardKeys + c, sums);
      }
    }
  }

  void output_in_place(const Tile& tile) {
    constexpr int lanes = kLanes<V>;
    for (int64_t r = 0; r < tile.rows; ++r) {
      S* weights = tile_.s + r * kForwardKeys;
      for (int64_t c = 0; c < tile.columns(); c += lanes) store(weights + c, load(tile_.p + r * kForwardKeys + c));
      int64_t d = 0;
      for (; d + 4 * lanes <= D_; d += 4 * lanes) add_in_place<4>(tile, r, d, All{});
      for (; d + lanes <= D_; d += lanes) add_in_place<1>(tile, r, d, All{});
      if (d < D_) add_in_place<1>(tile, r, d, static_cast<int>(D_ - d));
    }
  }

  // Several vectors of the output at once, since a sum has to wait for its last addition.
  template <int vectors, class Count>
  WARPLOOM_INLINE void add_in_place(const Tile& tile, int64_t r, int64_t d, Count n) {
    const S* weights = tile_.s + r * kForwardKeys;
    S* o = tile_.o + (tile.row + r) * columns_ + d;
    V sums[vectors] = {};
    for (int i = 0; !tile.first && i < vectors; ++i) sums[i] = load(o + i * kLanes<V>);
    const T* v = key_row(args_.v, tile.key) + d;
    for (int64_t c = 0; c < tile.seen; ++c, v += args_.v.t_stride) {
      const V weight = broadcast(weights[c]);
      for (int i = 0; i < vectors; ++i) sums[i] = fma(weight, load(v + i * kLanes<V>, n), sums[i]);
    }
    for (int i = 0; i < vectors; ++i) store(o + i * kLanes<V>, sums[i]);
  }

  // What the product leaves to do before a softmax: scaling, the bias, hiding what is not seen.
  void complete_scores(const Tile& tile) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t query = first_ + tile.row + r;
      S* s = tile_.s + r * kForwardKeys;
      if (scale_.apart) scale_apart(tile, query, s);
      if (tile.whole) continue;
      hide_outside<V>(s, first_seen(sequence_, query) - tile.key, end_seen(sequence_, query) - tile.key,
                      tile.columns());
    }
  }

  // Row r of the tile: scores to 2^(scores + row_shift), and the sums of those.
  void softmax(const Tile& tile, int64_t r) {
    const int64_t row = tile.row + r;
    if (!tile_.row_is_shifted[row]) shift(tile, r);
    V sums = exponentials(tile, r);
    if (!all_below(sums, kMostSum)) {
      shift(tile, r);
      sums = exponentials(tile, r);
    }
    S* row_sums = tile_.row_sums + row * kLanes<V>;
    store(row_sums, load(row_sums) + sums);
  }

  WARPLOOM_INLINE V exponentials(const Tile& tile, int64_t r) const {
    constexpr int per_step = kDepthStep<E> / kLanes<V>;
    const int64_t columns = tile.columns();
    const S* s = tile_.s + r * kForwardKeys;
    E* p = tile_.p + r * kForwardKeys;
    const V scale = broadcast(scale_.left), shift = broadcast(tile_.row_shift[tile.row + r]);
    V sums{};
    for (int64_t c = 0; c < columns; c += kDepthStep<E>) {
      V values[per_step], total{};
      for (int j = 0; j < per_step; ++j) {
        values[j] = two_to<E>(fma(load(s + c + j * kLanes<V>), scale, shift));
        total += values[j];
      }
      store_step(values, p + c);
      sums += total;
    }
    return sums;
  }

  void scale_apart(const Tile& tile, int64_t query, S* s) const {
    const V scale = broadcast(scale_.scale), to_log2 = broadcast(static_cast<S>(kLog2E));
    for (int64_t c = 0; c < tile.columns(); c += kLanes<V>) store(s + c, load(s + c) * scale);
    if (args_.bias.data == nullptr) return;
    with_bias_row<T>(args_.bias, head_, query, [&](const auto* bias) {
      each_vector<V>(tile.seen, [&](int64_t c, auto n) {
        store(s + c, fma(load(bias + tile.key + c, n), to_log2, load(s + c, n)), n);
      });
    });
  }

  // The largest score of the row, lane by lane.
  V best_lanes(const Tile& tile, int64_t r) const {
    const S* s = tile_.s + r * kForwardKeys;
    V best = load(s);
    for (int64_t c = kLanes<V>; c < tile.columns(); c += kLanes<V>) best = max(best, load(s + c));
    return best;
  }

  // Shifts rows for the first time, as many at once as a vector has lanes.
  void shift_all(const Tile& tile) {
    for (int64_t r = 0; r < tile.rows; r += kLanes<V>) {
      V rows[kLanes<V>];
      for (int i = 0; i < kLanes<V>; ++i) rows[i] = best_lanes(tile, smaller(r + i, tile.rows - 1));
      transpose(rows);
      V best = rows[0];
      for (int i = 1; i < kLanes<V>; ++i) best = max(best, rows[i]);
      for (int i = 0; i < smaller(kLanes<V>, tile.rows - r); ++i) set_shift(tile.row + r + i, -best[i] * scale_.left);
    }
  }

  // A row that has seen nothing yet stays as it is: the shift would be infinite.
  void set_shift(int64_t row, S shift) {
    if (!(shift < static_cast<S>(kInfinity))) return;
    tile_.row_shift[row] = shift;
    tile_.row_is_shifted[row] = true;
  }

  // Shifts the row further if its largest score asks for it, and brings down what was summed before.
  __attribute__((noinline)) void shift(const Tile& tile, int64_t r) {
    const V lanes = best_lanes(tile, r);
    S best = lanes[0];
    for (int i = 1; i < kLanes<V>; ++i) best = lanes[i] > best ? lanes[i] : best;
    const int64_t row = tile.row + r;
    const S before = tile_.row_shift[row], after = -best * scale_.left;
    if (tile_.row_is_shifted[row] && !(after < before)) return;
    set_shift(row, after);
    if (tile.first || !tile_.row_is_shifted[row]) return;
    const V shrink = two_to<E>(broadcast(after - before));
    S *o = tile_.o + row * columns_, *row_sums = tile_.row_sums + row * kLanes<V>;
    for (int64_t d = 0; d < columns_; d += kLanes<V>) store(o + d, load(o + d) * shrink);
    store(row_sums, load(row_sums) * shrink);
  }

  void finish(int64_t rows) {
    const int64_t query = sequence_.first_query + first_;
    S* lse = args_.lse + (sequence_.b * args_.problem.H + head_) * args_.problem.T + query;
    for (int64_t r = 0; r < rows; ++r) {
      T* o = args_.o.row(sequence_.b, head_, query + r);
      const S total = sum(load(tile_.row_sums + r * kLanes<V>));
      if (total == 0) {
        store_zeros(o, D_);
        lse[r] = -kInfinity;
      } else {
        store_scaled(tile_.o + r * columns_, 1 / total, D_, o);
        lse[r] = log(total) - tile_.row_shift[r] * static_cast<S>(kLn2);
      }
    }
  }

  const AttentionForward<T>& args_;
  const AttentionSequence& sequence_;
  int64_t kv_head_, group_, D_, width_, columns_;
  bool in_place_;
  ScoreScale<S> scale_;
  ForwardLayout<T> tile_{};
  int64_t first_key_ = 0, keys_padded_ = 0;  // of the packed keys
  int64_t head_ = 0, first_ = 0;             // of the block of queries
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
WARPLOOM_INLINE void store_rows_as_group(Floats low, Floats high, bf16* out) {
  const __m512i low_then_high = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  alignas(64) static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                           21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), low_then_high));
}
#endif
template <class V, class E>
WARPLOOM_INLINE void store_rows_as_group(V row, V, E* out) {
  store(out, row);
}

// The sums of ds that make dbias, for one key/value head after another. Key by key: row(key)[query] is where ds of the
// two is added, 16 queries at an aligned place at once.
//
// A bias of rows and columns has a sum for each, turned like ds^T. A bias by distance has them for each query - key,
// and 16 times over, by key % 16: so the queries next to each other add to places next to each other, and aligned.
template <class S>
struct BiasSums {
  S* data;  // null: not wanted
  bool by_distance;
  int64_t row_stride;   // from one key to the next, or from one key % 16 to the next
  int64_t head_stride;  // 0: of one head only
  int64_t zero;         // place of distance 0

  S* row(int64_t head, int64_t key) const {
    if (!by_distance) return data + head * head_stride + key * row_stride;
    return data + key % kPanel * row_stride + zero - round_down(key, kPanel);
  }
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
               const BiasSums<S>& dbias)
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
  // until this thread's next pass, or into `sums` if that is given. Calls end_of_head(head) after each head's last.
  template <class EndOfHead>
  void run(int64_t first_block, int64_t last_block, int64_t blocks_per_head, S* sums, EndOfHead&& end_of_head) {
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
      head_ = kv_head_ * group_ + block / blocks_per_head;
      attend(block % blocks_per_head * kBackwardQueries);
      if (block + 1 == last_block || (block + 1) % blocks_per_head == 0) end_of_head(head_);
    }
  }

  const S* dk() const { return tile_.dk; }
  const S* dv() const { return tile_.dv; }

 private:
  // Queries from `first` on.
  void attend(int64_t first) {
    first_ = first;
    rows_ = smaller(kBackwardQueries, sequence_.num_queries - first);
    const int64_t padded_rows = round_up(rows_, kDepthStep<E>), query = sequence_.first_query + first;
    const T* q = args_.q.row(sequence_.b, head_, query);
    const T* d_o = args_.d_o.row(sequence_.b, head_, query);
    const int64_t q_stride = args_.q.t_stride, d_o_stride = args_.d_o.t_stride;
    pack_right(q, q_stride, rows_, D_, padded_rows, tile_.queries, kQueryPanel, tile_.buffer);
    pack_right(d_o, d_o_stride, rows_, D_, padded_rows, tile_.d_o, kQueryPanel, tile_.buffer);
    pack_right_transposed(q, q_stride, rows_, D_, padded_rows, width_, tile_.queries_turned, tile_.buffer);
    pack_right_transposed(d_o, d_o_stride, rows_, D_, padded_rows, width_, tile_.d_o_turned, tile_.buffer);
    gather_row_statistics(query, padded_rows);
    store_zeros(tile_.dq_turned, columns_ * kBackwardQueries);

    const int64_t end = end_seen(sequence_, first + rows_ - 1);
    for (int64_t key = round_down(first_seen(sequence_, first), kBackwardKeys); key < end; key += kBackwardKeys) {
      attend_keys(key, smaller(kBackwardKeys, end - key));
    }
    store_dq(query);
  }

  // The block of queries against keys [key, key + there).
  void attend_keys(int64_t key, int64_t there) {
    const int64_t padded = round_up(there, kStrip), columns = round_up(rows_, kStrip);
    const bool whole = first_seen(sequence_, first_ + rows_ - 1) <= key && end_seen(sequence_, first_) >= key + padded;
    // Along the diagonals in strips of keys, each with only the queries from the first to the last that see a key of
    // it.
    const int64_t strip = whole ? padded : kStrip;
    for (int64_t row = 0; row < padded; row += strip) {
      const int64_t from = round_down(larger(0, key + row - sequence_.last_diagonal - first_), kStrip);
      const int64_t last = key + row + strip - 1 - sequence_.first_diagonal - first_;
      const int64_t to = smaller(columns, round_up(last + 1, kStrip));
      if (from < to) attend_strip({key + row, row, strip, there - row, from, to - from, whole});
    }
    if (whole) {
      add_dq(key, 0, padded, 0, columns);
      return;
    }
    for (int64_t column = 0; column < columns; column += kStrip) {
      const int64_t from = round_down(larger(0, first_seen(sequence_, first_ + column) - key), kStrip);
      const int64_t seen = smaller(there, end_seen(sequence_, first_ + column + kStrip - 1) - key);
      if (from < seen) add_dq(key, from, round_up(seen, kStrip), column, kStrip);
    }
  }

  // Keys [key, key + strip), at rows [row, row + strip) of the block of keys, against queries [from, from + columns).
  // `there` of the keys are not padding.
  struct Strip {
    int64_t key, row, strip, there, from, columns;
    bool whole;
    int64_t at() const { return row * kBackwardQueries + from; }
  };

  // What they give to dk, dv and dbias, and ds for dq.
  void attend_strip(const Strip& t) {
    const int64_t at = t.at(), right = t.from * width_;
    product<false>(t.strip, t.columns, width_, tile_.keys + t.key * width_, width_, tile_.queries_turned + right,
                   kPanel * width_, tile_.s + at, kBackwardQueries);
    product<false>(t.strip, t.columns, width_, tile_.values + t.key * width_, width_, tile_.d_o_turned + right,
                   kPanel * width_, tile_.dp + at, kBackwardQueries);
    if (scale_.apart) scale_apart(t);
    for (int64_t r = 0; !t.whole && r < t.strip; ++r) {
      const int64_t place = t.key + r - first_ - t.from;  // of the query at distance 0 from this key
      const int64_t first = r < t.there ? place - sequence_.last_diagonal : t.columns;
      hide_outside<V>(tile_.s + at + r * kBackwardQueries, first, place - sequence_.first_diagonal + 1, t.columns);
    }
    to_score_gradients(t);
    if (dbias_.data != nullptr) add_dbias(t);
    product<true>(t.strip, columns_, t.columns, tile_.p + at, kBackwardQueries, tile_.d_o + t.from * kPanel,
                  kQueryPanel, tile_.dv + t.key * columns_, columns_);
    product<true>(t.strip, columns_, t.columns, tile_.ds + at, kBackwardQueries, tile_.queries + t.from * kPanel,
                  kQueryPanel, tile_.dk + t.key * columns_, columns_);
  }

  // dq^T of queries [column, column + count) += k^T ds^T over keys [from, to) of the block of keys.
  void add_dq(int64_t key, int64_t from, int64_t to, int64_t column, int64_t count) {
    product<true>(columns_, count, to - from, tile_.keys_turned + key + from, keys_padded_,
                  tile_.ds_right + column * kBackwardKeys + from * kPanel, kBackwardKeys * kPanel,
                  tile_.dq_turned + column, kBackwardQueries);
  }

  void gather_row_statistics(int64_t query, int64_t padded_rows) {
    const S* lse = args_.lse + (sequence_.b * args_.problem.H + head_) * args_.problem.T + query;
    for (int64_t r = 0; r < padded_rows; ++r) {
      // +inf makes every probability of the row zero: the row sees nothing, or is padding.
      const bool blind = r >= rows_ || lse[r] == static_cast<S>(-kInfinity);
      tile_.row_lse[r] = blind ? static_cast<S>(kInfinity) : lse[r] * static_cast<S>(kLog2E);
      tile_.row_delta[r] = 0;
      if (r >= rows_) continue;
      const T* o = args_.o.row(sequence_.b, head_, query + r);
      const T* d_o = args_.d_o.row(sequence_.b, head_, query + r);
      V products = {};
      each_vector<V>(D_, [&](int64_t i, auto n) { products = fma(load(o + i, n), load(d_o + i, n), products); });
      tile_.row_delta[r] = sum(products);
    }
  }

  void scale_apart(const Strip& t) {
    const V scale = broadcast(scale_.scale), to_log2 = broadcast(static_cast<S>(kLog2E));
    const bool has_bias = args_.bias.data != nullptr;
    if (has_bias) turn_bias(t);
    for (int64_t r = 0; r < t.strip; ++r) {
      S* s = tile_.s + t.at() + r * kBackwardQueries;
      const S* bias = tile_.bias + t.at() + r * kBackwardQueries;
      for (int64_t i = 0; i < t.columns; i += kLanes<V>) {
        const V scaled = load(s + i) * scale;
        store(s + i, has_bias ? fma(load(bias + i), to_log2, scaled) : scaled);
      }
    }
  }

  // The bias, keys by queries; zeros where there is padding.
  void turn_bias(const Strip& t) {
    constexpr int lanes = kLanes<V>;
    for (int64_t i = 0; i < t.columns; i += lanes) {
      for (int64_t r = 0; r < t.strip; r += lanes) {
        const int count = static_cast<int>(smaller(lanes, t.there - r));
        V block[lanes] = {};
        for (int64_t j = 0; count > 0 && j < smaller(lanes, rows_ - t.from - i); ++j) {
          with_bias_row<T>(args_.bias, head_, first_ + t.from + i + j, [&](const auto* bias) {
            block[j] = count == lanes ? load(bias + t.key + r) : load(bias + t.key + r, count);
          });
        }
        transpose(block);
        for (int j = 0; j < lanes; ++j) store(tile_.bias + t.at() + (r + j) * kBackwardQueries + i, block[j]);
      }
    }
  }

  // From s^T and dp^T of a strip of keys: p^T, ds^T as left and as right operand. dp^T is replaced by ds^T.
  void to_score_gradients(const Strip& t) {
    constexpr int lanes = kLanes<V>, per_step = kDepthStep<E> / lanes;
    const V scale = broadcast(scale_.left);
    for (int64_t r = t.row; r < t.row + t.strip; r += kGroup<E>) {
      for (int64_t i = t.from; i < t.from + t.columns; i += kDepthStep<E>) {
        V ds[kGroup<E>][per_step];
        for (int g = 0; g < kGroup<E>; ++g) {
          const int64_t at = (r + g) * kBackwardQueries + i;
          V p[per_step];
          for (int j = 0; j < per_step; ++j) {
            const V lse = load(tile_.row_lse + i + j * lanes), delta = load(tile_.row_delta + i + j * lanes);
            p[j] = two_to<E>(fma(load(tile_.s + at + j * lanes), scale, -lse));
            ds[g][j] = p[j] * (load(tile_.dp + at + j * lanes) - delta);
            if (dbias_.data != nullptr) store(tile_.dp + at + j * lanes, ds[g][j]);
          }
          store_step(p, tile_.p + at);
          store_step(ds[g], tile_.ds + at);
        }
        for (int j = 0; j < per_step; ++j) {
          const int64_t column = i + j * lanes;
          store_rows_as_group(
              ds[0][j], ds[kGroup<E> - 1][j],
              tile_.ds_right + column / kPanel * (kBackwardKeys * kPanel) + r * kPanel + column % kPanel);
        }
      }
    }
  }

  void add_dbias(const Strip& t) {
    for (int64_t r = 0; r < smaller(t.strip, t.there); ++r) {
      const S* ds = tile_.dp + t.at() + r * kBackwardQueries;
      S* sums = dbias_.row(head_ - kv_head_ * group_, t.key + r) + first_ + t.from;
      for (int64_t i = 0; i < t.columns; i += kLanes<V>) store(sums + i, load(sums + i) + load(ds + i));
    }
  }

  void store_dq(int64_t query) {
    using U = typename UnitOf<sizeof(S)>::type;
    for (int64_t d = 0; d < columns_; d += kPanel) {
      const U* sources[kPanel];
      for (int i = 0; i < kPanel; ++i) {
        sources[i] = reinterpret_cast<const U*>(tile_.dq_turned + (d + i) * kBackwardQueries);
      }
      transpose_16_rows(sources, kBackwardQueries, reinterpret_cast<U*>(tile_.dq + d), columns_);
    }
    const S factor = static_cast<S>(args_.problem.softmax_scale);
    for (int64_t r = 0; r < rows_; ++r) {
      store_scaled(tile_.dq + r * columns_, factor, D_, args_.dq.row(sequence_.b, head_, query + r));
    }
  }

  const AttentionBackward<T>& args_;
  const AttentionSequence& sequence_;
  int64_t kv_head_, group_, D_, width_, columns_, keys_padded_;
  ScoreScale<S> scale_;
  BiasSums<S> dbias_;
  BackwardLayout<T> tile_;
  int64_t head_ = 0, first_ = 0, rows_ = 0;  // of the block of queries
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

// The partial sums of dk and dv, and those of dbias, may take so many bytes each, or what one copy takes.
constexpr int64_t kMostBytesOfSums = int64_t{256} << 20;

// How the backward is cut into independent items: ranges of sequences x key/value heads x splits of the query rows.
// An item has sums of dbias of its own and, if there are splits, sums of dk and dv.
template <class T>
class Backward {
  using E = Element<T>;
  using S = Sum<T>;

 public:
  explicit Backward(const AttentionBackward<T>& args)
      : args_(args),
        problem_(args.problem),
        group_(args.problem.H / args.problem.H_kv),
        columns_(round_up(args.problem.D, kPanel)),
        ranges_(args.problem.num_sequences) {
    for (int64_t n = 0; n < problem_.num_sequences; ++n) {
      most_queries_ = larger(most_queries_, problem_.sequences[n].num_queries);
      most_keys_ = larger(most_keys_, problem_.sequences[n].num_keys);
    }
    const int64_t wanted = 2 * args.parallelism;
    if (args.dbias != nullptr) {
      dbias_.by_distance = args.bias.by_distance();
      if (dbias_.by_distance) {
        dbias_.zero = round_up(most_keys_, kBackwardKeys);
        dbias_.row_stride = dbias_.zero + round_up(most_queries_, kBackwardQueries) + kPanel;
        dbias_per_head_ = args.dbias_columns;
      } else {
        dbias_.row_stride = round_up(args.dbias_rows, kBackwardQueries);
        dbias_.head_stride = dbias_per_head_ = args.dbias_columns * dbias_.row_stride;
      }
      ranges_ = at_most(ranges_, problem_.H * dbias_per_head_);
      // Each range costs a pass over sums as large as the bias.
      if (!dbias_.by_distance) ranges_ = smaller(ranges_, (wanted + problem_.H_kv - 1) / problem_.H_kv);
    }
    // Too few items for the processors are split by query rows. Not below 256: each part goes through all keys.
    const int64_t items = ranges_ * problem_.H_kv;
    if (items == 0) return;
    part_ = 2 * round_up(most_keys_, kDepthStep<E>) * columns_;
    splits_ = smaller((wanted + items - 1) / items, group_ * most_queries_ / 256);
    splits_ = at_most(splits_, problem_.num_sequences * problem_.H_kv * part_);
  }

  void run() {
    const int64_t heads = problem_.num_sequences * problem_.H_kv, items = ranges_ * problem_.H_kv * splits_;
    if (splits_ > 1) dk_dv_sums_ = scratch<S>(0, heads * splits_ * part_);
    if (args_.dbias != nullptr) {
      dbias_sums_ = scratch<S>(1, num_dbias_copies() * problem_.H * dbias_per_head_);
      parallel_for(num_dbias_copies() * problem_.H,
                   [&](int64_t i) { store_zeros(dbias_sums_ + i * dbias_per_head_, dbias_per_head_); });
    }
    parallel_for(items, [&](int64_t item) { run_item(item); });
    if (splits_ > 1) parallel_for(heads, [&](int64_t head) { add_splits(head); });
    if (args_.dbias == nullptr) return;
    if (args_.bias.is_float) {
      store_dbias(static_cast<float*>(args_.dbias));
    } else {
      store_dbias(static_cast<T*>(args_.dbias));
    }
  }

 private:
  // `count` copies of so many sums, or as many as may be, but one.
  static int64_t at_most(int64_t count, int64_t sums) {
    const int64_t limit = sums == 0 ? count : kMostBytesOfSums / static_cast<int64_t>(sizeof(S)) / sums;
    return larger(1, smaller(count, limit));
  }

  // Splits share the sums of a bias of rows and columns, of which each has rows of its own.
  int64_t num_dbias_copies() const { return dbias_.by_distance ? ranges_ * splits_ : ranges_; }

  S* dbias_sums(int64_t copy, int64_t head) const { return dbias_sums_ + (copy * problem_.H + head) * dbias_per_head_; }

  void run_item(int64_t item) {
    const int64_t range = item / (problem_.H_kv * splits_), kv_head = item / splits_ % problem_.H_kv;
    const int64_t split = item % splits_, copy = dbias_.by_distance ? range * splits_ + split : range;
    BiasSums<S> dbias = dbias_;
    if (args_.dbias != nullptr && dbias_.by_distance) {
      dbias.data = scratch<S>(5, kPanel * dbias_.row_stride);
      store_zeros(dbias.data, kPanel * dbias_.row_stride);
    } else if (args_.dbias != nullptr) {
      dbias.data = dbias_sums(copy, kv_head * group_);
    }
    const int64_t first = problem_.num_sequences * range / ranges_;
    const int64_t last = problem_.num_sequences * (range + 1) / ranges_;
    for (int64_t n = first; n < last; ++n) {
      const AttentionSequence& sequence = problem_.sequences[n];
      const int64_t per_head = (sequence.num_queries + kBackwardQueries - 1) / kBackwardQueries;
      const int64_t blocks = group_ * per_head, part = ((n * problem_.H_kv + kv_head) * splits_ + split) * part_;
      BackwardPass<T> pass(args_, sequence, kv_head, dbias);
      pass.run(blocks * split / splits_, blocks * (split + 1) / splits_, per_head,
               splits_ > 1 ? dk_dv_sums_ + part : nullptr, [&](int64_t head) {
                 if (dbias.data != nullptr && dbias_.by_distance) add_skewed(dbias.data, dbias_sums(copy, head));
               });
      if (splits_ == 1) store_dk_dv(args_, sequence, kv_head, pass.dk(), pass.dv());
    }
  }

  // sums[place of distance j - i] += what ds of all such i and j came to, which is cleared.
  void add_skewed(S* skewed, S* sums) const {
    for (int64_t column = 0; column < args_.dbias_columns; ++column) {
      const int64_t place = dbias_.zero + args_.bias.offset - column;
      if (place < 0 || place + kPanel > dbias_.row_stride) continue;
      for (int i = 0; i < kPanel; ++i) sums[column] += skewed[i * dbias_.row_stride + place + i];
    }
    store_zeros(skewed, kPanel * dbias_.row_stride);
  }

  void add_splits(int64_t head) {
    const AttentionSequence& sequence = problem_.sequences[head / problem_.H_kv];
    const int64_t half = round_up(sequence.num_keys, kDepthStep<E>) * columns_;
    S* total = dk_dv_sums_ + head * splits_ * part_;
    for (int64_t split = 1; split < splits_; ++split) {
      const S* more = total + split * part_;
      each_vector<Lanes<T>>(2 * half,
                            [&](int64_t i, auto n) { store(total + i, load(total + i, n) + load(more + i, n), n); });
    }
    store_dk_dv(args_, sequence, head % problem_.H_kv, total, total + half);
  }

  // dbias = the sums over all copies and, if they share one bias, heads, in order; rounded once.
  template <class B>
  void store_dbias(B* dbias) {
    const int64_t rows = args_.dbias_rows, columns = args_.dbias_columns, blocks = (rows + kPanel - 1) / kPanel;
    const int64_t heads_per_bias = problem_.H / args_.bias.heads, copies = num_dbias_copies();
    parallel_for(args_.bias.heads * blocks, [&](int64_t item) {
      const int64_t first_head = item / blocks * heads_per_bias, first_row = item % blocks * kPanel;
      const int64_t there = smaller(kPanel, rows - first_row);
      for (int64_t column = 0; column < columns; ++column) {
        S total[kPanel] = {};
        for (int64_t copy = 0; copy < copies; ++copy) {
          for (int64_t head = first_head; head < first_head + heads_per_bias; ++head) {
            const S* sums = dbias_.by_distance ? dbias_sums(copy, head) + column
                                               : dbias_sums(copy, head) + column * dbias_.row_stride + first_row;
            for (int i = 0; i < there; ++i) total[i] += sums[i];
          }
        }
        for (int i = 0; i < there; ++i) {
          from_float(total[i], dbias + (item / blocks * rows + first_row + i) * columns + column);
        }
      }
    });
  }

  const AttentionBackward<T>& args_;
  const AttentionProblem& problem_;
  int64_t group_, columns_, ranges_, splits_ = 1, part_ = 0, most_queries_ = 0, most_keys_ = 0;
  BiasSums<S> dbias_{};
  int64_t dbias_per_head_ = 0;
  S *dk_dv_sums_ = nullptr, *dbias_sums_ = nullptr;
};

template <class T>
void attention_bwd(const AttentionBackward<T>& args) {
  Backward<T>(args).run();
}

template <class T>
constexpr AttentionKernels<T> kKernels = {attention_fwd<T>, attention_bwd<T>};

}  // namespace

extern const AttentionTable attention = {kKernels<float>, kKernels<double>, kKernels<bf16>, kKernels<fp16>};

}  // namespace warploom::cpu::WARPLOOM_LEVEL
