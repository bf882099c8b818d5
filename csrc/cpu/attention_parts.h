// What the attention kernels share besides their products: which keys a query sees, how scores are scaled, biased and
// hidden, exponentials, and the cutting up of scratch memory.
#pragma once

#include "common/parallel.h"
#include "common/simd.h"
#include "cpu/attention.h"
#include "cpu/attention_tiles.h"

namespace warploom::cpu::WARPLOOM_LEVEL {
namespace {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr double kInfinity = __builtin_inf();

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

}  // namespace
}  // namespace warploom::cpu::WARPLOOM_LEVEL
