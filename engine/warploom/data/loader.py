"""Loader: batches of windows over a split, in an order that a seed decides and two numbers restore.

A split is read as a ring of N tokens: <|endoftext|> doc 1 <|endoftext|> doc 2 ... and round to the first token again.
A window is seq_len inputs and, one further, seq_len targets. An epoch has N // seq_len windows that do not overlap, so
each but N % seq_len tokens is a target once; what is left over is dropped, and since a shuffled epoch begins at a place
of its own on the ring, it is another part each time.

Sample g, counted over all epochs and ranks, is window permute(g % windows) of epoch g // windows. A rank takes every
world_size-th sample, so neither the number of ranks nor the batch size changes the order, and batches run across
epochs without a seam.

<|endoftext|> is the first token of each document and the target that ends the one before. So with separate_documents
every target is predicted from its own document alone, and the first character of a document from <|endoftext|>, as in
sampling without a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from warploom.data.dataset import TokenSplit
from warploom.errors import UserError

IGNORE_INDEX = -100
_PLANNED_BATCHES = 256


@dataclass(frozen=True)
class Batch:
    """tokens, targets, positions: (B, T) int64. cu_seqlens: (n + 1,) int32 offsets of the documents over the flattened
    B * T tokens, or None if documents are not kept apart. positions restart with each document, and at the start of
    a row. num_bytes: UTF-8 bytes of text behind the targets that count."""

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    cu_seqlens: Tensor | None
    num_bytes: int


class Loader:
    """Endless iterator of training batches."""

    def __init__(
        self,
        split: TokenSplit,
        *,
        seq_len: int,
        micro_batch_size: int,
        seed: int,
        shuffle: bool = True,
        separate_documents: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ):
        """Raises UserError if the split is shorter than one window."""
        if split.num_tokens < seq_len:
            raise UserError(
                f"the {split.name} split has {split.num_tokens} tokens, fewer than one context of {seq_len}; "
                "give more text or a smaller seq-len"
            )
        self._split = split
        self._seq_len, self._micro_batch_size = seq_len, micro_batch_size
        self._seed, self._shuffle = seed, shuffle
        self._separate_documents = separate_documents
        self._rank, self._world_size = rank, world_size
        self.windows_per_epoch = split.num_tokens // seq_len
        self._sample = 0  # the next, over all epochs and ranks
        self._planned = np.empty((0, micro_batch_size), dtype=np.int64)  # window starts of the batches to come

    @property
    def epoch(self) -> int:
        """Epoch of the next sample, from 0."""
        return self._sample // self.windows_per_epoch

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        if not len(self._planned):
            self._planned = self._plan()
        starts, self._planned = self._planned[0], self._planned[1:]
        self._sample += self._micro_batch_size * self._world_size
        return _batch(self._split, starts, self._seq_len, self._separate_documents)

    def _plan(self) -> np.ndarray:
        """(_PLANNED_BATCHES, B) starts of the windows: numpy's cost per call is shared by many batches."""
        samples = np.arange(_PLANNED_BATCHES * self._micro_batch_size) * self._world_size + self._sample + self._rank
        epoch, window = np.divmod(samples.astype(np.uint64), np.uint64(self.windows_per_epoch))
        start = np.zeros_like(window)
        if self._shuffle:
            key = mix(mix(np.full_like(epoch, self._seed % (1 << 64))) + epoch)
            start = mix(~key) % np.uint64(self._split.num_tokens)
            window = permute(window, self.windows_per_epoch, key)
        start = (start + window * np.uint64(self._seq_len)) % np.uint64(self._split.num_tokens)
        return start.astype(np.int64).reshape(_PLANNED_BATCHES, self._micro_batch_size)

    def next_starts(self) -> np.ndarray:
        """Pass over some batches and return the starts of their windows, (n,) int64, in order: what training on them
        would have read."""
        starts = self._planned if len(self._planned) else self._plan()
        self._planned = starts[:0]
        self._sample += starts.size * self._world_size
        return starts.reshape(-1)

    def state_dict(self) -> dict[str, Any]:
        """Position and what gives it its meaning, as JSON values."""
        epoch, index = divmod(self._sample, self.windows_per_epoch)
        return {"epoch": epoch, "index": index, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where state_dict was taken; batch size, rank and world size may differ.

        Raises UserError if the data, the window or the order are not those of the state.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise UserError(
                    f"the position in the data was saved with {name} {state.get(name)!r}, this run has {value!r}; "
                    "go on with the same data and settings, or start a new run"
                )
        self._sample = state["epoch"] * self.windows_per_epoch + state["index"]
        self._planned = self._planned[:0]

    def _identity(self) -> dict[str, Any]:
        return {
            "fingerprint": self._split.fingerprint,
            "windows_per_epoch": self.windows_per_epoch,
            "seq_len": self._seq_len,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }


def evaluation_batches(
    split: TokenSplit,
    *,
    seq_len: int,
    micro_batch_size: int,
    separate_documents: bool = True,
    max_windows: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Yield each window of a split once, in order, the last batch with fewer rows if they do not come out even.

    All N tokens of the split are targets once: the text, and one <|endoftext|> per document. Targets past the end
    are IGNORE_INDEX. So bits per byte is exactly the summed loss / ln 2 / the summed num_bytes: the losses of the
    <|endoftext|> count in it, and the bytes are those of the text (over all windows, split.num_bytes).
    max_windows: take only so many, evenly spread over the split.
    """
    N = split.num_tokens
    windows = -(-N // seq_len)
    starts = np.arange(windows) * seq_len
    if max_windows is not None and max_windows < windows:
        starts = starts[np.arange(max_windows) * windows // max_windows]
    starts = starts[rank::world_size]
    for first in range(0, len(starts), micro_batch_size):
        yield _batch(split, starts[first : first + micro_batch_size], seq_len, separate_documents, end=N)


def _batch(
    split: TokenSplit, starts: np.ndarray, seq_len: int, separate_documents: bool, end: int | None = None
) -> Batch:
    """Windows at starts on the ring, (B,) int64; targets from position end + 1 on are IGNORE_INDEX."""
    B, T = len(starts), seq_len
    window = split.read(starts, T + 1)  # (B, T + 1) int64
    if not 0 <= window.min() <= window.max() < len(split.token_bytes):
        bad = window.max() if window.max() >= len(split.token_bytes) else window.min()
        raise UserError(
            f"the {split.name} split holds the token {bad}, and its tokenizer has those from 0 to "
            f"{len(split.token_bytes) - 1}: its files are damaged; tokenize again"
        )
    tokens, targets = window[:, :-1].copy(), window[:, 1:].copy()
    num_bytes = int(split.token_bytes[targets].sum())
    if end is not None and starts[-1] + T > end:
        padding = targets[-1, end - starts[-1] :]
        num_bytes -= int(split.token_bytes[padding].sum())
        padding[:] = IGNORE_INDEX
    if separate_documents:
        cuts = _document_cuts(split, starts, T)
        positions = (np.arange(B * T) - np.repeat(cuts[:-1], np.diff(cuts))).reshape(B, T)
    else:
        cuts, positions = None, np.tile(np.arange(T), (B, 1))
    return Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(positions),
        cu_seqlens=None if cuts is None else torch.from_numpy(cuts.astype(np.int32)),
        num_bytes=num_bytes,
    )


def _document_cuts(split: TokenSplit, starts: np.ndarray, T: int) -> np.ndarray:
    """Where documents begin in the flattened (B, T) windows, each row's start and the end B * T included: int64."""
    N, begins = split.num_tokens, split.document_starts
    rows = np.arange(len(starts) + 1) * T

    def begun(position: np.ndarray) -> np.ndarray:
        """Documents that begin before position, counted on round the ring."""
        rounds, rest = np.divmod(position, N)
        # Keys of another dtype would make numpy copy the whole mapped array.
        return rounds * len(begins) + np.searchsorted(begins, rest.astype(begins.dtype), side="left")

    first, last = begun(starts + 1), begun(starts + T)
    counts = last - first
    ordinal = np.arange(counts.sum()) + np.repeat(first - (np.cumsum(counts) - counts), counts)
    rounds, document = np.divmod(ordinal, len(begins))
    inside = begins[document].astype(np.int64) + rounds * N - np.repeat(starts - rows[:-1], counts)
    return np.sort(np.concatenate([rows, inside]))


def mix(x: np.ndarray) -> np.ndarray:
    """Scramble (..., ) uint64, one to one: the finalizer of splitmix64 (Steele et al., 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Map index in [0, size) to its place in the permutation that key picks; index, key: (n,) uint64.

    A Feistel network permutes the next power of four; what lands outside is sent through again until it lands inside
    (cycle walking). So nothing is stored, and any element costs the same.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask, drop = np.uint64((1 << int(half)) - 1), np.uint64(64) - half
    place = index.copy()
    outside = np.ones(len(place), dtype=bool)
    while outside.any():
        left, right, round_key = place[outside] >> half, place[outside] & mask, key[outside]
        for _ in range(6):
            round_key = mix(round_key)
            left, right = right, left ^ (mix(right ^ round_key) >> drop)
        place[outside] = (left << half) | right
        outside = place >= np.uint64(size)
    return place
