// Backward: the gradients of q, k, v and of a bias, from probabilities made again out of the log-sum-exp.
#include "cpu/attention_parts.h"

namespace warploom::cpu::WARPLOOM_LEVEL {
namespace {

constexpr int kBackwardQueries = 64, kBackwardKeys = 64;

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
void run_backward(const AttentionBackward<T>& args) {
  Backward<T>(args).run();
}

}  // namespace

extern const AttentionBackwardTable attention_bwd = {run_backward<float>, run_backward<double>, run_backward<bf16>,
                                                     run_backward<fp16>};

}  // namespace warploom::cpu::WARPLOOM_LEVEL
