"""The keys and values of tokens already read, so that each new token costs one position and not the whole sequence."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """Implements nn.attention.AttentionCache for rows of unequal length, packed to the left.

    The first call reads the right-padded prompts, `lengths` (B,) of them real. Each later call appends one token per
    row right after the row's last key, over the padding. Call advance() after each pass of the model.
    """

    def __init__(self, lengths: Tensor, max_len: int) -> None:
        self.cross: dict[int, tuple[Tensor, Tensor]] = {}
        self._prompt_lengths = lengths
        self._max_len = max_len
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._lengths: Tensor | None = None  # (B,) keys held per row; None before the prompts are read

    def num_keys(self, num_new: int) -> int:
        return num_new if self._lengths is None else int(self._lengths.max()) + num_new

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        if self._lengths is None:
            B, H_kv, T, D = k.shape
            room = (k.new_zeros(B, H_kv, self._max_len, D), v.new_zeros(B, H_kv, self._max_len, D))
            room[0][:, :, :T], room[1][:, :, :T] = k, v
            self._layers[layer] = room
            return k, v, None  # padding comes after every real query, so the causal mask hides it
        keys, values = self._layers[layer]
        rows = torch.arange(k.shape[0], device=k.device)
        keys[rows, :, self._lengths] = k[:, :, 0]
        values[rows, :, self._lengths] = v[:, :, 0]
        S = self.num_keys(1)
        return keys[:, :, :S], values[:, :, :S], self._lengths + 1

    def advance(self) -> None:
        """Count the tokens that the model has just read."""
        self._lengths = self._prompt_lengths.clone() if self._lengths is None else self._lengths + 1

    def select(self, rows: Tensor) -> None:
        """Keep these rows (any order, repeats allowed): beams that live on take their history with them."""
        self._layers = {layer: (k[rows], v[rows]) for layer, (k, v) in self._layers.items()}
        self.cross = {layer: (k[rows], v[rows]) for layer, (k, v) in self.cross.items()}
        self._prompt_lengths = self._prompt_lengths[rows]
        if self._lengths is not None:
            self._lengths = self._lengths[rows]


class PrefixCache:
    """Implements nn.attention.AttentionCache for text that many rows have in common: read once, then gone on from.

    All rows hold equally many keys, so any number of tokens can follow; rows are multiplied by fork. A pass in which
    rows are padded on the right is the last one that is right.
    """

    def __init__(self) -> None:
        self.cross: dict[int, tuple[Tensor, Tensor]] = {}
        self.length = 0  # keys per row
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def layers(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values (B, H_kv, length, D) by layer."""
        return self._layers

    def num_keys(self, num_new: int) -> int:
        return self.length + num_new

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        if layer in self._layers:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self._layers[layer], (k, v), strict=True))
        self._layers[layer] = (k, v)
        return k, v, None

    def advance(self, num_new: int) -> None:
        """Count the tokens per row that the model has just read."""
        self.length += num_new

    def fork(self, rows: Tensor) -> PrefixCache:
        """Return a cache of these rows (any order, repeats allowed), which goes on apart from this one."""
        forked = PrefixCache()
        forked.length = self.length
        forked._layers = {layer: (k[rows], v[rows]) for layer, (k, v) in self._layers.items()}
        return forked
