// The gradients of linear layers that share their input: one of them for linear, three for linear_qkv.
#pragma once

#include "cpu/linear_qkv.h"
#include "cpu/packed_weight.h"

namespace warploom::cpu::WARPLOOM_LEVEL {

template <class T, class W>
static RightPanels<T> backward_panels(const W* weight, int64_t F, int64_t C, const void* packed,
                                      typename RightPanels<T>::Element* memory) {
  using Element = typename RightPanels<T>::Element;
  if (packed != nullptr) return {static_cast<const Element*>(packed) + RightPanels<T>::size(F, C), C, F};
  return pack_right_operand<T>(backward_operand(weight, F, C), memory);
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
    int64_t unpacked = 0;
    each_layer([&](int, const Layer& layer) { unpacked += layer.packed ? 0 : RightPanels<T>::size(C, layer.F); });
    Element* panels = scratch<Element>(0, unpacked);
    Operand<T, /*kAlongK=*/true>* lefts = scratch<Operand<T, true>>(2, args.count);
    RightPanels<T>* rights = scratch<RightPanels<T>>(3, args.count);
    each_layer([&](int i, const Layer& layer) {
      lefts[i] = {layer.dy, layer.F, M, layer.F};
      rights[i] = backward_panels<T>(layer.weight, layer.F, C, layer.packed, panels);
      if (layer.packed == nullptr) panels += RightPanels<T>::size(C, layer.F);
    });
    T* dx = args.dx;
    gemm_sum(lefts, rights, args.count,
             [=](int64_t m, int64_t c, auto v, auto lanes) { store(dx + m * C + c, v, lanes); });
  }
  bool wanted = false;
  each_layer([&](int, const Layer& layer) { wanted |= layer.dweight != nullptr; });
  if (!wanted) return;
  const Operand<T, /*kAlongK=*/false> x_by_column = {args.x, C, C, M};
  const RightPanels<T> x = pack_right_operand<T>(x_by_column, scratch<Element>(0, RightPanels<T>::size(C, M)));
  each_layer([&](int, const Layer& layer) {
    if (layer.dweight == nullptr) return;
    auto* sums = scratch<typename Accumulator<T>::type>(2, layer.F);
    const Operand<T, /*kAlongK=*/false> dy_by_column = {layer.dy, layer.F, layer.F, M};
    W* dweight = layer.dweight;
    gemm(
        dy_by_column, x, [=](int64_t f, int64_t c, auto v, auto lanes) { store(dweight + f * C + c, v, lanes); }, sums);
    if (layer.dbias == nullptr) return;
    each_vector<typename VectorOf<T>::type>(layer.F,
                                            [&](int64_t f, auto n) { store(layer.dbias + f, load(sums + f, n), n); });
  });
}

}  // namespace warploom::cpu::WARPLOOM_LEVEL
