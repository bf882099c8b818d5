// A weight (F, C) of a linear layer as its products read it: panels for the forward, x weight^T, followed by panels for
// the gradient of x, dy weight. Packed by strips of rows, so that who has just written a strip can pack it at once.
#pragma once

#include "cpu/gemm.h"

namespace warploom::cpu::WARPLOOM_LEVEL {

// A strip is a multiple of the widths of all tiles' panels, and of the depths they are padded to.
constexpr int64_t kRowsPerStrip = 32;

// The weight as the right operand of the forward, C by F, and of the gradient of x, F by C.
template <class W>
static Operand<W, /*kAlongK=*/true> forward_operand(const W* weight, int64_t F, int64_t C) {
  return {weight, C, F, C};
}
template <class W>
static Operand<W, /*kAlongK=*/false> backward_operand(const W* weight, int64_t F, int64_t C) {
  return {weight, C, C, F};
}

template <class T>
static int64_t packed_elements(int64_t F, int64_t C) {
  return RightPanels<T>::size(F, C) + RightPanels<T>::size(C, F);
}

// Packs rows [first, last) of the weight for activations of type T into their places in `panels`, which holds
// packed_elements. first is a multiple of kRowsPerStrip, and last too unless it is F.
template <class T, class W>
static void pack_rows(const W* weight, int64_t F, int64_t C, int64_t first, int64_t last,
                      typename RightPanels<T>::Element* panels) {
  using Panels = RightPanels<T>;
  using Tile = typename Panels::Tile;
  static_assert(kRowsPerStrip % Tile::kPanel == 0 && kRowsPerStrip % Tile::kDepth == 0);
  typename Tile::Sum* const no_sums = nullptr;
  const int64_t forward_size = Panels::panel_size(C), first_panel = first / Tile::kPanel;
  const int64_t end_panel = last < F ? last / Tile::kPanel : Panels::num_panels(F);
  pack_panels<Tile::kPanel, Tile::kGroupB, Tile::kDepth>(forward_operand(weight, F, C), first, end_panel - first_panel,
                                                         0, C, panels + first_panel * forward_size, forward_size,
                                                         no_sums);
  pack_panels<Tile::kPanel, Tile::kGroupB, Tile::kDepth>(
      backward_operand(weight, F, C), 0, Panels::num_panels(C), first, last,
      panels + Panels::size(F, C) + first * Tile::kPanel, Panels::panel_size(F), no_sums);
}

}  // namespace warploom::cpu::WARPLOOM_LEVEL
