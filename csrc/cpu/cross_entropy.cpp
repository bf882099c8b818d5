#include "cpu/cross_entropy.h"

#include "common/parallel.h"
#include "common/simd.h"

namespace warploom::cpu::WARPLOOM_LEVEL {
namespace {

WARPLOOM_INLINE float log_of(float x) { return __builtin_logf(x); }
WARPLOOM_INLINE double log_of(double x) { return __builtin_log(x); }

// Returns the row's loss. Memory is read once, in the pass for the maximum, and written once, in the last; the
// exponentials between them are computed once and kept, in the accumulator's type, in a row that stays in the cache.
template <class T>
double row_fwd(const CrossEntropyForward<T>& args, int64_t row) {
  using V = typename VectorOf<T>::type;
  using Scalar = typename Accumulator<T>::type;
  const T* logits = args.logits + row * args.V;
  T* dlogits = args.dlogits == nullptr ? nullptr : args.dlogits + row * args.V;
  const int64_t target = args.targets[row];
  if (target == args.ignore_index) {
    if (dlogits != nullptr) memset(dlogits, 0, static_cast<uint64_t>(args.V) * sizeof(T));
    return 0;
  }

  V largest = broadcast(-static_cast<Scalar>(__builtin_inf()));
  each_vector<V>(args.V, [&](int64_t i, auto n) {
    prefetch_ahead(logits + i);
    largest = max(hide_beyond(load(logits + i, n), n), largest);
  });
  const Scalar shift = max_lane(largest);

  constexpr Scalar kLog2E = static_cast<Scalar>(1.4426950408889634);
  Scalar* p = scratch<Scalar>(4, args.V);  // times total
  V sums = {};
  each_vector<V>(args.V, [&](int64_t i, auto n) {
    const V exponential = keep_first(exp2((load(logits + i, n) - broadcast(shift)) * kLog2E), n);
    sums += exponential;
    if (dlogits != nullptr) {
      prefetch_ahead(dlogits + i, 0);
      store(p + i, exponential, n);
    }
  });
  const Scalar total = sum(sums), of_target = to_float(logits[target]) - shift;

  if (dlogits != nullptr) {
    p[target] -= total;
    const V scale = broadcast(static_cast<Scalar>(args.scale) / total);
    each_vector<V>(args.V, [&](int64_t i, auto n) { store(dlogits + i, load(p + i, n) * scale, n); });
  }
  return static_cast<double>(log_of(total)) - of_target;
}

template <class T>
void cross_entropy_fwd(const CrossEntropyForward<T>& args) {
  constexpr int64_t kElementsPerBlock = 1 << 14;
  const int64_t rows_per_block = 1 + kElementsPerBlock / args.V;
  double* losses = scratch<double>(0, args.N);
  parallel_for((args.N + rows_per_block - 1) / rows_per_block, [&](int64_t block) {
    const int64_t end = (block + 1) * rows_per_block;
    for (int64_t row = block * rows_per_block; row < (end < args.N ? end : args.N); ++row) {
      losses[row] = row_fwd(args, row);
    }
  });
  double loss = 0;
  for (int64_t row = 0; row < args.N; ++row) loss += losses[row];
  *args.loss = loss;
}

template <class T>
constexpr CrossEntropyKernels<T> kKernels = {cross_entropy_fwd<T>};

}  // namespace

extern const CrossEntropyTable cross_entropy = {kKernels<float>, kKernels<double>, kKernels<bf16>, kKernels<fp16>};

}  // namespace warploom::cpu::WARPLOOM_LEVEL
