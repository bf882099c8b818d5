#include "cpu/linear_cross_entropy.h"

#include "cpu/gemm.h"

namespace warploom::cpu::WARPLOOM_LEVEL {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kInfinity = __builtin_inf();

template <class T>
using Sum = typename Accumulator<T>::type;
template <class T>
using Lanes = typename VectorOf<T>::type;
template <class T>
using Element = typename RightPanels<T>::Element;

WARPLOOM_INLINE float log_of(float x) { return __builtin_logf(x); }
WARPLOOM_INLINE double log_of(double x) { return __builtin_log(x); }
WARPLOOM_INLINE float exp_of(float x) { return __builtin_expf(x); }
WARPLOOM_INLINE double exp_of(double x) { return __builtin_exp(x); }

template <class V>
WARPLOOM_INLINE V exp_of_lanes(V x) {
  return exp2(x * static_cast<decltype(x[0] + x[0])>(kLog2E));
}

// Sum over j of exp(x_j), kept as sums * exp(shift), a lane of sums for each lane of the vectors that are added. The
// shift follows the largest x at a distance: within kSlack above it nothing can overflow.
template <class V>
struct ExponentialSum {
  using Scalar = decltype(V{}[0] + V{}[0]);
  static constexpr Scalar kSlack = 40;
  V sums;
  Scalar shift;

  WARPLOOM_INLINE void clear() {
    sums = V{};
    shift = static_cast<Scalar>(-kInfinity);
  }

  // Lanes that do not count are -inf.
  WARPLOOM_INLINE void add(V x) {
    if (exceeds(x, shift + kSlack)) raise_shift(x);
    sums += exp_of_lanes(x - broadcast(finite_shift()));
  }

  // The log of the whole sum.
  Scalar log_total() const { return finite_shift() + log_of(sum(sums)); }

 private:
  WARPLOOM_INLINE Scalar finite_shift() const { return shift == static_cast<Scalar>(-kInfinity) ? Scalar(0) : shift; }

  static WARPLOOM_INLINE bool exceeds(V v, Scalar bound) {
#if defined(WARPLOOM_HAS_AVX512)
    if constexpr (sizeof(Scalar) == sizeof(float)) return _mm512_cmp_ps_mask(v, broadcast(bound), _CMP_GT_OQ) != 0;
#endif
    bool any = false;
    for (int i = 0; i < kLanes<V>; ++i) any |= v[i] > bound;
    return any;
  }

  void raise_shift(V x) {
    const Scalar largest = max_lane(x);
    // Before the first there is nothing to bring down, and exp of a first that is far below 0 is infinite.
    if (shift != static_cast<Scalar>(-kInfinity)) sums *= exp_of_lanes(broadcast(shift - largest));
    shift = largest;
  }
};

// The words [first, last) of the vocabulary as the right operand of the logits.
template <class W>
Operand<W, /*kAlongK=*/true> words(const W* weight, int64_t first, int64_t last, int64_t C) {
  return {weight + first * C, C, last - first, C};
}

// The log-sum-exp of each row and the sum of the losses. logits takes the logits, or is NoResult.
template <class T, class W, class Logits>
static double losses(const LinearCrossEntropyForward<T, W>& args, const Logits& logits) {
  using V = Lanes<T>;
  using S = Sum<T>;
  const int64_t N = args.N, C = args.C;
  // As many words as one block of the product's columns holds: so a thread packs its words, and multiplies them while
  // they are near. More would be two blocks, and two threads would add to the sums of one row at once.
  using Depths = DepthRanges<T, Operand<T, /*kAlongK=*/true>>;
  const int64_t per_block = Depths::tiles_per_block(Depths::length(C)) * RightPanels<T>::Tile::kCols;
  const int64_t blocks = (args.V + per_block - 1) / per_block;
  S* block_lse = scratch<S>(0, blocks * N);  // (blocks, N)
  S* target_logits = scratch<S>(1, N);
  for (int64_t m = 0; m < N; ++m) target_logits[m] = 0;  // stays so for words of other shards
  const Operand<T, /*kAlongK=*/true> hidden = {args.hidden, C, N, C};

  parallel_for(blocks, [&](int64_t block) {
    const int64_t first = block * per_block, last = smaller(first + per_block, args.V);
    const RightPanels<T> panels = pack_right_operand<T>(words(args.weight, first, last, C),
                                                        scratch<Element<T>>(6, RightPanels<T>::size(last - first, C)));
    auto* sums = scratch<ExponentialSum<V>>(7, N);
    for (int64_t m = 0; m < N; ++m) sums[m].clear();
    gemm(hidden, panels, logits.from_column(first), [=](int64_t m, int64_t n, auto v, auto lanes) {
      const int64_t target = args.targets[m] - first - n;
      if (target >= 0 && target < kLanes<V> && n + target < last - first) {
        target_logits[m] = v[static_cast<int>(target)];
      }
      sums[m].add(hide_beyond(v, lanes));
      return v;
    });
    for (int64_t m = 0; m < N; ++m) block_lse[block * N + m] = sums[m].log_total();
  });

  double loss = 0;
  for (int64_t m = 0; m < N; ++m) {
    S largest = static_cast<S>(-kInfinity);
    for (int64_t block = 0; block < blocks; ++block) {
      if (block_lse[block * N + m] > largest) largest = block_lse[block * N + m];
    }
    S total = 0;
    for (int64_t block = 0; block < blocks; ++block) total += exp_of(block_lse[block * N + m] - largest);
    args.lse[m] = largest + log_of(total);
    if (args.targets[m] != args.ignore_index) loss += static_cast<double>(args.lse[m]) - target_logits[m];
  }
  return loss;
}

// What is left of a row's logits, which are its own: their gradient, in place.
template <class T>
static void row_gradient(T* logits, int64_t V, Sum<T> lse, int64_t target) {
  using Vector = Lanes<T>;
  const auto target_logit = to_float(logits[target]);
  each_vector<Vector>(
      V, [&](int64_t i, auto n) { store(logits + i, exp_of_lanes(load(logits + i, n) - broadcast(lse)), n); });
  from_float(exp_of(target_logit - lse) - 1, logits + target);
}

// Adds dlogits (N, count), rows `stride` apart, times weight (count, C) to dhidden (N, C). sums (N, C) holds what there
// is between the first words and the last.
template <class T, class W>
static void add_dhidden(const T* dlogits, int64_t stride, const W* weight, int64_t count, int64_t N, int64_t C,
                        bool first, bool last, Sum<T>* sums, T* dhidden, Element<T>* panels) {
  using S = Sum<T>;
  const Operand<T, /*kAlongK=*/true> by_row = {dlogits, stride, N, count};
  const Operand<W, /*kAlongK=*/false> by_feature = {weight, C, C, count};
  const RightPanels<T> packed = pack_right_operand<T>(by_feature, panels);
  gemm(by_row, packed, NoResult{}, [=](int64_t m, int64_t c, auto v, auto lanes) {
    S* at = sums + m * C + c;
    if (!first) v += load(at, lanes);
    if (!last) {
      store(at, v, lanes);
    } else {
      store(dhidden + m * C + c, v, lanes);
    }
  });
}

// dweight (count, C) = dlogits^T hidden (N, C), or added to it.
template <class T, class W>
static void add_dweight(const T* dlogits, int64_t stride, const T* hidden, int64_t count, int64_t N, int64_t C,
                        bool first, W* dweight, Element<T>* panels) {
  const Operand<T, /*kAlongK=*/false> by_word = {dlogits, stride, count, N}, rows = {hidden, C, C, N};
  const RightPanels<T> packed = pack_right_operand<T>(rows, panels);
  gemm(by_word, packed, ResultRows<W>(dweight, count, C),
       [=](int64_t m, int64_t c, auto v, auto lanes) { return first ? v : v + load(dweight + m * C + c, lanes); });
}

// Some rows at a time: their logits, from which both gradients are made before the next rows.
template <class T, class W>
static void forward_with_gradients(const LinearCrossEntropyForward<T, W>& args) {
  // Each chunk of rows packs the weight anew and, but the first, reads dweight.
  constexpr int64_t kLogitsAtOnce = 16 << 20, kFewestRows = 512, kWordsAtOnce = 2048;
  const int64_t C = args.C, V = args.V;
  const int64_t at_once = smaller(args.N, larger(kFewestRows, kLogitsAtOnce / V));
  T* logits = scratch<T>(2, at_once * V);
  *args.loss = 0;
  for (int64_t first_row = 0; first_row < args.N; first_row += at_once) {
    LinearCrossEntropyForward<T, W> rows = args;
    rows.hidden += first_row * C, rows.targets += first_row, rows.lse += first_row;
    rows.N = smaller(at_once, args.N - first_row);
    *args.loss += losses(rows, ResultRows<T>(logits, rows.N, V));
    parallel_for(rows.N, [=](int64_t m) {
      T* row = logits + m * V;
      if (rows.targets[m] != rows.ignore_index) return row_gradient(row, V, rows.lse[m], rows.targets[m]);
      memset(row, 0, static_cast<uint64_t>(V) * sizeof(T));
    });
    if (args.dhidden != nullptr) {
      Element<T>* panels = scratch<Element<T>>(0, RightPanels<T>::size(C, smaller(kWordsAtOnce, V)));
      auto* sums = scratch<Sum<T>>(3, rows.N * C);
      for (int64_t word = 0; word < V; word += kWordsAtOnce) {
        const int64_t count = smaller(kWordsAtOnce, V - word);
        add_dhidden(logits + word, V, args.weight + word * C, count, rows.N, C, word == 0, word + count == V, sums,
                    args.dhidden + first_row * C, panels);
      }
    }
    if (args.dweight != nullptr) {
      add_dweight(logits, V, rows.hidden, V, rows.N, C, first_row == 0, args.dweight,
                  scratch<Element<T>>(0, RightPanels<T>::size(C, rows.N)));
    }
  }
  if (args.N == 0 && args.dweight != nullptr) memset(args.dweight, 0, static_cast<uint64_t>(V * C) * sizeof(W));
}

template <class T, class W>
void linear_cross_entropy_fwd(const LinearCrossEntropyForward<T, W>& args) {
  if (args.dhidden == nullptr && args.dweight == nullptr) {
    *args.loss = losses(args, NoResult{});
  } else {
    forward_with_gradients(args);
  }
}

template <class T, class W>
void linear_cross_entropy_bwd(const LinearCrossEntropyBackward<T, W>& args) {
  using V = Lanes<T>;
  using S = Sum<T>;
  constexpr int64_t kLogitsAtOnce = 4 << 20, kMostWords = 2048, kFewestWords = 512;
  const int64_t N = args.N, C = args.C;
  const int64_t at_once = smaller(kMostWords, larger(kFewestWords, kLogitsAtOnce / larger(N, 1) / 32 * 32));
  T* dlogits = scratch<T>(1, N * smaller(at_once, args.V));
  S* dhidden = args.dhidden == nullptr ? nullptr : scratch<S>(2, N * C);
  const Operand<T, /*kAlongK=*/true> hidden = {args.hidden, C, N, C};
  const S scale = static_cast<S>(args.scale);

  for (int64_t first = 0; first < args.V; first += at_once) {
    const int64_t count = smaller(at_once, args.V - first);
    const auto chunk = words(args.weight, first, first + count, C);
    Element<T>* panels = scratch<Element<T>>(0, larger(RightPanels<T>::size(count, C), RightPanels<T>::size(C, count)));
    const ResultRows<T> rows_of_dlogits(dlogits, N, count);
    gemm(hidden, pack_right_operand<T>(chunk, panels), rows_of_dlogits, [=](int64_t m, int64_t n, auto v, auto) {
      if (args.targets[m] == args.ignore_index) return V{};
      V p = exp_of_lanes(v - broadcast(args.lse[m]));
      const int64_t target = args.targets[m] - first - n;
      if (target >= 0 && target < kLanes<V>) p[static_cast<int>(target)] -= 1;
      return p * scale;
    });
    if (args.dhidden != nullptr) {
      add_dhidden(dlogits, count, args.weight + first * C, count, N, C, first == 0, first + count == args.V, dhidden,
                  args.dhidden, panels);
    }
    if (args.dweight != nullptr) {
      // The rows are the same for every chunk, and cheaper to pack again than to keep: a small part of the product.
      add_dweight(dlogits, count, args.hidden, count, N, C, /*first=*/true, args.dweight + first * C,
                  scratch<Element<T>>(3, RightPanels<T>::size(C, N)));
    }
  }
}

template <class T, class W>
constexpr LinearCrossEntropyKernelsOf<T, W> kKernelsOf = {linear_cross_entropy_fwd<T, W>,
                                                          linear_cross_entropy_bwd<T, W>};
template <class T>
constexpr LinearCrossEntropyKernels<T> kKernels = {kKernelsOf<T, T>, kKernelsOf<T, float>};
template <>
constexpr LinearCrossEntropyKernels<double> kKernels<double> = {kKernelsOf<double, double>, {nullptr, nullptr}};

}  // namespace

extern const LinearCrossEntropyTable linear_cross_entropy = {kKernels<float>, kKernels<double>, kKernels<bf16>,
                                                             kKernels<fp16>};

}  // namespace warploom::cpu::WARPLOOM_LEVEL
