// Forward: blocks of query rows against blocks of keys, with online softmax.
#include "cpu/attention_parts.h"

namespace warploom::cpu::WARPLOOM_LEVEL {
namespace {

constexpr int kForwardQueries = 128, kForwardKeys = 128, kForwardStrip = 32;
constexpr int kCacheLine = 64;

// Into the second-level cache, since the first is full of operands.
WARPLOOM_INLINE void prefetch_row(const void* row, int64_t bytes) {
  constexpr int kForReading = 0, kSecondLevel = 2;
  for (int64_t i = 0; i < bytes; i += kCacheLine) {
    __builtin_prefetch(static_cast<const char*>(row) + i, kForReading, kSecondLevel);
  }
}

// Of numbers that are neither negative, zero nor subnormal: NaN and infinity stay what they are. As Cephes' logf:
// within 1e-7 relative, or absolute where the result is below 1.
WARPLOOM_INLINE Floats log(Floats x) {
  // x = m * 2^e with m in [sqrt(1/2), sqrt(2)).
  constexpr int32_t kSqrtHalf = 0x3f3504f3, kMantissa = 0x007fffff;
  const Ints offset = (Ints)x - kSqrtHalf, exponent = offset >> 23;
  const Floats e = __builtin_convertvector(exponent, Floats);
  const Floats m = (Floats)((offset & kMantissa) + kSqrtHalf) - broadcast(1.0f);
  Floats p = fma(broadcast(7.0376836292e-2f), m, broadcast(-1.1514610310e-1f));
  p = fma(p, m, broadcast(1.1676998740e-1f));
  p = fma(p, m, broadcast(-1.2420140846e-1f));
  p = fma(p, m, broadcast(1.4249322787e-1f));
  p = fma(p, m, broadcast(-1.6668057665e-1f));
  p = fma(p, m, broadcast(2.0000714765e-1f));
  p = fma(p, m, broadcast(-2.4999993993e-1f));
  p = fma(p, m, broadcast(3.3333331174e-1f));
  const Floats square = m * m;
  p = fma(p * m, square, fma(e, broadcast(-2.12194440e-4f), broadcast(-0.5f) * square));
  const Floats result = fma(e, broadcast(0.693359375f), m + p);
  return x < broadcast(static_cast<float>(kInfinity)) ? result : x;
}
WARPLOOM_INLINE Doubles log(Doubles x) {
  for (int i = 0; i < kLanes<Doubles>; ++i) x[i] = __builtin_log(x[i]);
  return x;
}

// In the order in which sum() adds the lanes of one vector.
template <class V>
WARPLOOM_INLINE V sum_of(V (&values)[kLanes<V>]) {
  for (int half = kLanes<V> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) values[i] += values[i + half];
  }
  return values[0];
}

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

// One key/value head of one sequence, and blocks of query rows of the heads that share it. Blocks are counted over
// those heads: block n is of head n / blocks_per_head of them, from row n % blocks_per_head * kForwardQueries on.
struct ForwardItem {
  const AttentionSequence* sequence;
  int64_t kv_head, first_block, last_block, blocks_per_head;

  ForwardItem(const AttentionProblem& problem, int64_t item, int64_t chunks)
      : sequence(problem.sequences + item / (problem.H_kv * chunks)), kv_head(item / chunks % problem.H_kv) {
    blocks_per_head = (sequence->num_queries + kForwardQueries - 1) / kForwardQueries;
    const int64_t blocks = problem.H / problem.H_kv * blocks_per_head, chunk = item % chunks;
    first_block = blocks * chunk / chunks;
    last_block = blocks * (chunk + 1) / chunks;
  }
};

// Asks for the first rows of an item beside the work on the one before, a row of each operand at a time. The
// processor's own prefetching finds its pace too late for heads of few rows: from memory, those of 256 rows took 1.5
// times as long as from the second-level cache.
template <class T>
class RowsAhead {
 public:
  RowsAhead() = default;
  RowsAhead(const AttentionForward<T>& args, const ForwardItem& item) : row_bytes_(args.problem.D * sizeof(T)) {
    if (item.first_block == item.last_block) return;
    const AttentionSequence& sequence = *item.sequence;
    const int64_t group = args.problem.H / args.problem.H_kv, head = item.first_block / item.blocks_per_head;
    const int64_t first = item.first_block % item.blocks_per_head * kForwardQueries;
    rows_[0] = {args.k.row(sequence.b, item.kv_head, sequence.first_key), args.k.t_stride, sequence.seen_keys};
    rows_[1] = {args.v.row(sequence.b, item.kv_head, sequence.first_key), args.v.t_stride, sequence.seen_keys};
    rows_[2] = {args.q.row(sequence.b, item.kv_head * group + head, sequence.first_query + first), args.q.t_stride,
                sequence.num_queries - first};
  }

  WARPLOOM_INLINE void ask() {
    if (next_ >= kMostRows) return;
    for (const Rows& rows : rows_) {
      if (next_ < rows.count) prefetch_row(rows.first + next_ * rows.stride, row_bytes_);
    }
    ++next_;
  }

 private:
  static constexpr int64_t kMostRows = 256;
  struct Rows {
    const T* first;
    int64_t stride, count;
  };
  Rows rows_[3] = {};
  int64_t row_bytes_ = 0, next_ = 0;
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
  ForwardPass(const AttentionForward<T>& args, const ForwardItem& item, const RowsAhead<T>& ahead)
      : args_(args),
        item_(item),
        sequence_(*item.sequence),
        kv_head_(item.kv_head),
        group_(args.problem.H / args.problem.H_kv),
        D_(args.problem.D),
        width_(round_up(D_, kDepthStep<E>)),
        columns_(round_up(D_, kPanel)),
        in_place_(group_ * sequence_.num_queries <= kMostRowsInPlace),
        scale_(args.problem.softmax_scale, args.bias),
        ahead_(ahead) {}

  void run() {
    int64_t end = 0;
    first_key_ = sequence_.num_keys;
    for (int64_t block = item_.first_block; block < item_.last_block; ++block) {
      const int64_t first = block % item_.blocks_per_head * kForwardQueries;
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
    for (int64_t block = item_.first_block; block < item_.last_block; ++block) {
      attend(kv_head_ * group_ + block / item_.blocks_per_head, block % item_.blocks_per_head * kForwardQueries);
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
  T* output_row(int64_t r) const { return args_.o.row(sequence_.b, head_, sequence_.first_query + first_ + r); }

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
    for (int64_t r = 0; r < tile.rows; ++r) {
      softmax(tile, r);
      ahead_.ask();
      if (tile.first) prefetch_row(output_row(tile.row + r), D_ * sizeof(T));
    }
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

  // As many rows at once as a vector has lanes.
  void finish(int64_t rows) {
    S* lse = args_.lse + (sequence_.b * args_.problem.H + head_) * args_.problem.T + sequence_.first_query + first_;
    each_vector<V>(rows, [&](int64_t r, auto n) {
      V sums[kLanes<V>];
      for (int i = 0; i < kLanes<V>; ++i) sums[i] = load(tile_.row_sums + smaller(r + i, rows - 1) * kLanes<V>);
      transpose(sums);
      const V total = sum_of(sums), factor = broadcast(static_cast<S>(1)) / total;
      const V of_seen = fma(load(tile_.row_shift + r, n), broadcast(static_cast<S>(-kLn2)), log(total));
      store(lse + r, total == V{} ? broadcast(static_cast<S>(-kInfinity)) : of_seen, n);
      for (int64_t i = 0; i < smaller(kLanes<V>, rows - r); ++i) {
        if (total[i] == 0) {
          store_zeros(output_row(r + i), D_);
        } else {
          store_scaled(tile_.o + (r + i) * columns_, factor[i], D_, output_row(r + i));
        }
      }
    });
  }

  const AttentionForward<T>& args_;
  const ForwardItem& item_;
  const AttentionSequence& sequence_;
  int64_t kv_head_, group_, D_, width_, columns_;
  bool in_place_;
  ScoreScale<S> scale_;
  RowsAhead<T> ahead_;
  ForwardLayout<T> tile_{};
  int64_t first_key_ = 0, keys_padded_ = 0;  // of the packed keys
  int64_t head_ = 0, first_ = 0;             // of the block of queries
};

template <class T>
void run_forward(const AttentionForward<T>& args) {
  const AttentionProblem& problem = args.problem;
  // Enough items to keep the threads busy to the end, each as large as that allows, since each packs its own keys.
  // A row's result does not depend on the cut.
  const int64_t heads = problem.num_sequences * problem.H_kv;
  const int64_t chunks = heads == 0 ? 0 : (4 * thread_count() + heads - 1) / heads;
  const int64_t items = heads * chunks, threads = thread_count();
  parallel_for(items, [&](int64_t i) {
    const ForwardItem item(problem, i, chunks);
    if (item.first_block == item.last_block) return;
    // Threads take turns, so that this is most likely the one that this thread goes on with.
    const int64_t next = i + threads;
    const RowsAhead<T> ahead = next < items ? RowsAhead<T>(args, ForwardItem(problem, next, chunks)) : RowsAhead<T>();
    ForwardPass<T>(args, item, ahead).run();
  });
}

}  // namespace

extern const AttentionForwardTable attention_fwd = {run_forward<float>, run_forward<double>, run_forward<bf16>,
                                                    run_forward<fp16>};

}  // namespace warploom::cpu::WARPLOOM_LEVEL
