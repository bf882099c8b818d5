"""A key-value cache whose rows come and go while the others are decoded: what continuous batching needs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class SlotCache:
    """Implements nn.attention.AttentionCache for up to num_slots rows of max_len tokens, one new token per row a pass.

    The rows in use are always the first `num_rows`, so that the model reads them in place: the row that is removed
    gives its slot to the last one. Memory is taken at the first insert, for all slots.
    """

    def __init__(self, num_slots: int, max_len: int) -> None:
        self.cross: dict[int, tuple[Tensor, Tensor]] = {}
        self.num_rows = 0
        self._num_slots, self._max_len = num_slots, max_len
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.lengths = torch.zeros(num_slots, dtype=torch.int64)  # keys held per row

    def insert(self, layers: Mapping[int, tuple[Tensor, Tensor]], lengths: Tensor) -> None:
        """Append rows whose prompts the model has read. layers: keys and values (B, H_kv, T, D) by layer, the first
        lengths (B,) of them real."""
        first, count = self.num_rows, len(lengths)
        if first + count > self._num_slots:
            raise ValueError(f"prompts must be at most {self._num_slots - first} to fit the free slots, got {count}")
        for layer, (k, v) in layers.items():
            if layer not in self._layers:
                _, H_kv, _, D = k.shape
                shape = (self._num_slots, H_kv, self._max_len, D)
                self._layers[layer] = k.new_zeros(shape), v.new_zeros(shape)
            T = k.shape[2]
            for held, new in zip(self._layers[layer], (k, v), strict=True):
                held[first : first + count, :, :T] = new
        self.lengths = self.lengths.to(lengths.device)
        self.lengths[first : first + count] = lengths
        self.num_rows += count

    def remove(self, row: int) -> None:
        """Free a row's slot; the last row takes it, and has its number from now on."""
        last = self.num_rows - 1
        if row != last:
            length = int(self.lengths[last])
            for held in (tensor for pair in self._layers.values() for tensor in pair):
                held[row, :, :length] = held[last, :, :length]
            self.lengths[row] = self.lengths[last]
        self.num_rows = last

    def num_keys(self, num_new: int) -> int:
        return int(self.lengths[: self.num_rows].max()) + num_new

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        keys, values = self._layers[layer]
        rows = torch.arange(self.num_rows, device=k.device)
        lengths = self.lengths[: self.num_rows]
        keys[rows, :, lengths] = k[:, :, 0]
        values[rows, :, lengths] = v[:, :, 0]
        S = self.num_keys(1)
        return keys[: self.num_rows, :, :S], values[: self.num_rows, :, :S], lengths + 1

    def advance(self) -> None:
        """Count the token of each row that the model has just read."""
        self.lengths[: self.num_rows] += 1
