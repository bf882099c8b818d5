// A weight (F, C) of a linear layer as its products read it: panels for the forward, x weight^T, which the backward
// turns into those for the gradient of x, dy weight, since keeping both would cost the weight's size once more. Packed
// by strips of rows, so that who has just written a strip can pack it at once.
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
  return RightPanels<T>::size(F, C);
}

// Packs rows [first, last) of the weight for activations of type T into their places in `panels`, which holds
// packed_elements. first is a multiple of kRowsPerStrip, and last too unless it is F.
template <class T, class W>
static void pack_rows(const W* weight, int64_t F, int64_t C, int64_t first, int64_t last,
                      typename RightPanels<T>::Element* panels) {
  using Panels = RightPanels<T>;
  using Tile = typename Panels::Tile;
  static_assert(kRowsPerStrip % Tile::kPanel == 0 && kRowsPerStrip % Tile::kDepth == 0);
  const int64_t panel_size = Panels::panel_size(C), first_panel = first / Tile::kPanel;
  const int64_t end_panel = last < F ? last / Tile::kPanel : Panels::num_panels(F);
  pack_panels<Tile::kPanel, Tile::kGroupB, Tile::kDepth>(forward_operand(weight, F, C), first, end_panel - first_panel,
                                                         0, C, panels + first_panel * panel_size, panel_size,
                                                         static_cast<typename Tile::Sum*>(nullptr));
}

// Rows of the weight out of a panel that packs them: cells [begin, end) of each go to rows + row * stride, which have
// room for whole blocks.
template <class Tile, class Element>
static void unpack_panel(const Element* panel, int64_t begin, int64_t end, Element* rows, int64_t stride) {
  using Cells = CellsOf<Element>;
  using V = typename Cells::Vector;
  constexpr int kBlock = kLanes<V>;
  static_assert(Tile::kGroupB == Cells::kDepth && Tile::kPanel % kBlock == 0);
  const auto unpack_block = [&](int64_t cell, int row, int depth) __attribute__((always_inline)) {
    V block[kBlock] = {};
    for (int i = 0; i < depth; ++i) {
      memcpy(&block[i], panel + ((cell + i) * Tile::kPanel + row) * Cells::kDepth, sizeof(V));
    }
    transpose(block);
    Element* to = rows + row * stride + (cell - begin) * Cells::kDepth;
    for (int i = 0; i < kBlock; ++i) memcpy(to + i * stride, &block[i], sizeof(V));
  };
  for (int row = 0; row < Tile::kPanel; row += kBlock) {
    int64_t cell = begin;
    for (; cell + kBlock <= end; cell += kBlock) unpack_block(cell, row, kBlock);
    if (cell < end) unpack_block(cell, row, static_cast<int>(end - cell));
  }
}

// The panels for the gradient of x, out of those for the forward: the same values, already rounded.
template <class T>
static RightPanels<T> turn_panels(const typename RightPanels<T>::Element* forward, int64_t F, int64_t C,
                                  typename RightPanels<T>::Element* memory) {
  using Panels = RightPanels<T>;
  using Tile = typename Panels::Tile;
  using Element = typename Panels::Element;
  constexpr int64_t kColumns = 256, kCells = kColumns / Tile::kGroupB;  // rows of a strip within the first-level cache
  static_assert(kColumns % Tile::kCols == 0);
  const int64_t cells = Panels::panel_size(C) / Tile::kPanel / Tile::kGroupB;
  parallel_for((F + kRowsPerStrip - 1) / kRowsPerStrip, [&](int64_t strip) {
    alignas(64) Element rows[kRowsPerStrip * kColumns];
    const int64_t first = strip * kRowsPerStrip, count = smaller(kRowsPerStrip, F - first);
    for (int64_t column = 0; column < C; column += kColumns) {
      const int64_t cell = column / Tile::kGroupB, width = smaller(kColumns, C - column);
      for (int64_t row = 0; row < count; row += Tile::kPanel) {
        unpack_panel<Tile>(forward + (first + row) / Tile::kPanel * Panels::panel_size(C), cell,
                           smaller(cell + kCells, cells), rows + row * kColumns, kColumns);
      }
      const Operand<Element, /*kAlongK=*/false> strip_rows = {rows, kColumns, width, count};
      pack_panels<Tile::kPanel, Tile::kGroupB, Tile::kDepth>(
          strip_rows, 0, Panels::num_panels(width), 0, count,
          memory + column / Tile::kPanel * Panels::panel_size(F) + first * Tile::kPanel, Panels::panel_size(F),
          static_cast<typename Tile::Sum*>(nullptr));
    }
  });
  return {memory, C, F};
}

}  // namespace warploom::cpu::WARPLOOM_LEVEL
