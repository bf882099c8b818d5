// The gradients of linear layers that share their input: one of them for linear, three for linear_qkv.
#pragma once

#include "cpu/linear_qkv.h"
#include "cpu/packed_weight.h"

namespace warploom::cpu::WARPLOOM_LEVEL {

template <class T, class Layer>
static RightPanels<T> backward_panels(const Layer& layer, int64_t C, typename RightPanels<T>::Element* memory) {
  const int64_t F = layer.F;
  if (layer.packed != nullptr) {
    return turn_panels<T>(static_cast<const typename RightPanels<T>::Element*>(layer.packed), F, C, memory);
  }
  if (layer.transposed) return pack_right_operand<T>(forward_operand(layer.weight, C, F), memory);
  return pack_right_operand<T>(backward_operand(layer.weight, F, C), memory);
}

// sums[f] = the sum of column f over the rows of dy (M, F); in blocks of rows, so that a sum of many numbers does not
// round each of them at its full size.
template <class T, class W>
static void sum_columns(const T* dy, int64_t M, int64_t F, W* sums) {
  using V = typename VectorOf<T>::type;
  constexpr int64_t kRows = 64, kVectors = 8, kColumns = kVectors * kLanes<V>;
  parallel_for((F + kColumns - 1) / kColumns, [&](int64_t block) {
    const int64_t first = block * kColumns, columns = smaller(kColumns, F - first);
    V totals[kVectors] = {};
    for (int64_t begin = 0; begin < M; begin += kRows) {
      V partial[kVectors] = {};
      for (int64_t m = begin; m < smaller(begin + kRows, M); ++m) {
        each_vector<V>(columns, [&](int64_t i, auto n) { partial[i / kLanes<V>] += load(dy + m * F + first + i, n); });
      }
      for (int i = 0; i < kVectors; ++i) totals[i] += partial[i];
    }
    each_vector<V>(columns, [&](int64_t i, auto n) { store(sums + first + i, totals[i / kLanes<V>], n); });
  });
}

// dweight (C, F) = x^T dy, and dbias.
template <class T, class W>
static void transposed_gradients(const LinearsBackward<T, W>& args,
                                 const typename LinearsBackward<T, W>::Layer& layer) {
  using Element = typename RightPanels<T>::Element;
  const int64_t M = args.M, C = args.C, F = layer.F;
  const Operand<T, /*kAlongK=*/false> x = {args.x, C, C, M}, dy = {layer.dy, F, F, M};
  const RightPanels<T> panels = pack_right_operand<T>(dy, scratch<Element>(0, RightPanels<T>::size(F, M)));
  gemm(x, panels, ResultRows<W>(layer.dweight, C, F), AsTheyAre{});
  if (layer.dbias != nullptr) sum_columns(layer.dy, M, F, layer.dbias);
}

template <class T, class W>
static void linears_bwd(const LinearsBackward<T, W>& args) {
  using Element = typename RightPanels<T>::Element;
  using Layer = typename LinearsBackward<T, W>::Layer;
  const int64_t M = args.M, C = args.C;
  const auto each_layer = [&](auto&& body) {
    for (int i = 0; i < args.count; ++i) body(i, args.layers[i]);
  };
  if (args.dx != nullptr) {
    int64_t size = 0;
    each_layer([&](int, const Layer& layer) { size += RightPanels<T>::size(C, layer.F); });
    Element* panels = scratch<Element>(0, size);
    Operand<T, /*kAlongK=*/true>* lefts = scratch<Operand<T, true>>(2, args.count);
    RightPanels<T>* rights = scratch<RightPanels<T>>(3, args.count);
    each_layer([&](int i, const Layer& layer) {
      lefts[i] = {layer.dy, layer.F, M, layer.F};
      rights[i] = backward_panels<T>(layer, C, panels);
      panels += RightPanels<T>::size(C, layer.F);
    });
    gemm_sum(lefts, rights, args.count, ResultRows<T>(args.dx, M, C), AsTheyAre{});
  }
  bool wanted = false;
  each_layer([&](int, const Layer& layer) {
    if (layer.dweight != nullptr && layer.transposed) return transposed_gradients(args, layer);
    wanted |= layer.dweight != nullptr;
  });
  if (!wanted) return;
  const Operand<T, /*kAlongK=*/false> x_by_column = {args.x, C, C, M};
  const RightPanels<T> x = pack_right_operand<T>(x_by_column, scratch<Element>(0, RightPanels<T>::size(C, M)));
  each_layer([&](int, const Layer& layer) {
    if (layer.dweight == nullptr || layer.transposed) return;
    auto* sums = scratch<typename Accumulator<T>::type>(2, layer.F);
    const Operand<T, /*kAlongK=*/false> dy_by_column = {layer.dy, layer.F, layer.F, M};
    gemm(dy_by_column, x, ResultRows<W>(layer.dweight, layer.F, C), AsTheyAre{}, sums);
    if (layer.dbias == nullptr) return;
    each_vector<typename VectorOf<T>::type>(layer.F,
                                            [&](int64_t f, auto n) { store(layer.dbias + f, load(sums + f, n), n); });
  });
}

}  // namespace warploom::cpu::WARPLOOM_LEVEL
