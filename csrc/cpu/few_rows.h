// y = activation(x weight^T + bias) for a few rows and a weight that nobody has packed, as sampling multiplies for
// every token: the weight is read once, as it lies in memory, while all rows are multiplied with what is in registers.
// float32 on one core of a Sapphire Rapids, 768 x 50257: 15, 13 and 10 GB/s of weights with 1, 4 and 8 rows, and 14, 6
// and 4 of torch 2.13's product.
#pragma once

#include <cstring>

#include "common/parallel.h"
#include "common/simd.h"
#include "cpu/activation.h"
#include "cpu/linear.h"

namespace warploom::cpu::WARPLOOM_LEVEL {

constexpr int64_t kFewRows = 16;
constexpr int64_t kColumnsAtOnce = 64;  // of y, whose rows of the weight stay in the cache for the next rows of x
constexpr int kRowsAtOnce = 8;

// Half of the lanes onto the other half, until there is one.
template <class V>
WARPLOOM_INLINE auto sum_of_lanes(V v) {
  using Scalar = decltype(v[0] + v[0]);
  if constexpr (sizeof(V) == 2 * sizeof(Scalar)) {
    return v[0] + v[1];
  } else {
    typedef Scalar Half __attribute__((vector_size(sizeof(V) / 2)));
    Half halves[2];
    memcpy(halves, &v, sizeof v);
    return sum_of_lanes(halves[0] + halves[1]);
  }
}

// sums (rows, kColumnsAtOnce): at (m, f) row m of x times row f of the weight. Each is summed in the same order
// whatever is beside it.
template <int rows, int columns, class T>
WARPLOOM_INLINE void multiply_few_rows(const T* x, const T* weight, int64_t C, T* sums) {
  using V = typename VectorOf<T>::type;
  V acc[rows][columns] = {};
  each_vector<V>(C, [&](int64_t c, auto n) {
    V w[columns];
    for (int f = 0; f < columns; ++f) {
      prefetch_ahead(weight + f * C + c, columns * C * static_cast<int64_t>(sizeof(T)));  // what comes next
      w[f] = load(weight + f * C + c, n);
    }
    for (int m = 0; m < rows; ++m) {
      const V x_m = load(x + m * C + c, n);
      for (int f = 0; f < columns; ++f) acc[m][f] = fma(x_m, w[f], acc[m][f]);
    }
  });
  for (int m = 0; m < rows; ++m) {
    for (int f = 0; f < columns; ++f) sums[m * kColumnsAtOnce + f] = sum_of_lanes(acc[m][f]);
  }
}

template <int rows, class T>
void multiply_few_rows_by_block(const T* x, const T* weight, int64_t C, int64_t columns, T* sums) {
  // What of 32 or 16 registers holds sums; the others are for what is multiplied.
  constexpr int kSums = kVectorBytes == 64 ? 16 : 8, kEach = kSums / (rows > 4 ? 8 : rows > 2 ? 4 : 2);
  constexpr int kTogether = kEach > 4 ? 4 : kEach;
  int64_t f = 0;
  for (; f + kTogether <= columns; f += kTogether) {
    multiply_few_rows<rows, kTogether>(x, weight + f * C, C, sums + f);
  }
  for (; f < columns; ++f) {
    multiply_few_rows<rows, 1>(x, weight + f * C, C, sums + f);
  }
}

template <class T>
void linear_fwd_of_few_rows(const LinearForward<T, T>& args) {
  using V = typename VectorOf<T>::type;
  using Multiply = void (*)(const T*, const T*, int64_t, int64_t, T*);
  static constexpr Multiply kMultiply[kRowsAtOnce] = {
      multiply_few_rows_by_block<1, T>, multiply_few_rows_by_block<2, T>, multiply_few_rows_by_block<3, T>,
      multiply_few_rows_by_block<4, T>, multiply_few_rows_by_block<5, T>, multiply_few_rows_by_block<6, T>,
      multiply_few_rows_by_block<7, T>, multiply_few_rows_by_block<8, T>};
  const int64_t F = args.F, C = args.C;
  parallel_for((F + kColumnsAtOnce - 1) / kColumnsAtOnce, [&](int64_t block) {
    const int64_t first = block * kColumnsAtOnce, columns = F - first < kColumnsAtOnce ? F - first : kColumnsAtOnce;
    for (int64_t begin = 0; begin < args.M; begin += kRowsAtOnce) {
      const int64_t rows = args.M - begin < kRowsAtOnce ? args.M - begin : kRowsAtOnce;
      T sums[kRowsAtOnce * kColumnsAtOnce];
      kMultiply[rows - 1](args.x + begin * C, args.weight + first * C, C, columns, sums);
      with_activation(args.activation, [&](auto activation) {
        for (int64_t m = 0; m < rows; ++m) {
          const int64_t at = (begin + m) * F + first;
          each_vector<V>(columns, [&](int64_t f, auto n) {
            V v = load(sums + m * kColumnsAtOnce + f, n);
            if (args.bias != nullptr) v += load(args.bias + first + f, n);
            if (args.h != nullptr) store(args.h + at + f, v, n);
            store(args.y + at + f, activation.value(v), n);
          });
        }
      });
    }
  });
}

}  // namespace warploom::cpu::WARPLOOM_LEVEL
