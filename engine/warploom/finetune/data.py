"""Examples as the trainer's data: packed once, in an order that a seed decides and a number restores."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from warploom.data.heldout import HASH_RANGE
from warploom.data.loader import mix, permute
from warploom.errors import UserError
from warploom.finetune.packing import PackedBatch, Unit, cut_to, length, pack, stack


@dataclass(frozen=True)
class Side:
    """One side of the split: units, the rows they are packed into, and, for pairs, (units, 2) float32 log-probabilities
    of the reference."""

    units: list[Unit]
    rows: list[list[int]]
    reference: np.ndarray | None = None

    def batch(self, rows: Iterable[int], seq_len: int, token_bytes: np.ndarray | None) -> PackedBatch:
        chosen = [self.rows[row] for row in rows]
        reference = None
        if self.reference is not None:
            reference = [self.reference[unit] for row in chosen for unit in row]
        return stack([[self.units[unit] for unit in row] for row in chosen], seq_len, token_bytes, reference)


class ExampleData:
    """TrainingData over examples (units of one) or pairs (units of two) that are held in memory.

    A unit is held out by a hash of its ids. num_cut and num_left_out count the units that were cut to seq_len, and
    those without an answer within it. token_bytes: for bits per byte; None for pairs.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        *,
        seq_len: int,
        seed: int,
        heldout_fraction: float,
        packing: bool,
        token_bytes: np.ndarray | None,
    ) -> None:
        """Raises UserError if either side of the split would be empty."""
        self._seq_len, self._seed, self._token_bytes = seq_len, seed, token_bytes
        fitting = [cut_to(unit, seq_len) for unit in units]
        self.num_left_out = sum(unit is None for unit in fitting)
        self.num_cut = sum(
            after is not None and length(after) < length(before) for before, after in zip(units, fitting, strict=True)
        )
        threshold = int(heldout_fraction * HASH_RANGE)
        sides: tuple[list[Unit], list[Unit]] = ([], [])
        for unit in fitting:
            if unit is not None:
                sides[_hash(unit) < threshold].append(unit)
        for name, side in zip(("training", "held-out"), sides, strict=True):
            if not side:
                raise UserError(
                    f"the {name} side has no example: {len(units)} were read and {self.num_left_out} have no answer "
                    f"within train.seq_len {seq_len}; give more data or another tune.heldout_fraction "
                    f"(now {heldout_fraction})"
                )
        self.train, self.heldout = (
            Side(side, pack([length(u) for u in side], seq_len) if packing else [[i] for i in range(len(side))])
            for side in sides
        )
        self.fingerprint = xxhash.xxh3_128_hexdigest(b"".join(_bytes(unit) for side in sides for unit in side))
        self.num_sequences = len(self.train.rows)

    def set_reference(self, train: np.ndarray, heldout: np.ndarray) -> None:
        """Take the reference's log-probabilities of the pairs, (units, 2) float32 of each side."""
        self.train = Side(self.train.units, self.train.rows, train)
        self.heldout = Side(self.heldout.units, self.heldout.rows, heldout)

    def train_batches(self, micro_batch_size: int) -> ExampleStream:
        return ExampleStream(self, micro_batch_size)

    def heldout_batches(self, micro_batch_size: int) -> Iterable[PackedBatch]:
        return self.batches(self.heldout, micro_batch_size)

    def batches(self, side: Side, micro_batch_size: int) -> Iterable[PackedBatch]:
        """Yield each row of a side once, in order."""
        for first in range(0, len(side.rows), micro_batch_size):
            rows = range(first, min(first + micro_batch_size, len(side.rows)))
            yield side.batch(rows, self._seq_len, self._token_bytes)

    def row_order(self, epoch: int) -> np.ndarray:
        """The rows of the training side in the order of that epoch."""
        count = self.num_sequences
        key = mix(mix(np.full(count, self._seed % (1 << 64), dtype=np.uint64)) + np.uint64(epoch))
        return permute(np.arange(count, dtype=np.uint64), count, key).astype(np.int64)

    def training_batch(self, rows: Iterable[int]) -> PackedBatch:
        return self.train.batch(rows, self._seq_len, self._token_bytes)

    @property
    def identity(self) -> dict[str, Any]:
        """What a position in the order of rows is a position in."""
        return {
            "fingerprint": self.fingerprint,
            "rows": self.num_sequences,
            "seq_len": self._seq_len,
            "seed": self._seed,
        }


class ExampleStream:
    """Endless training batches: every row once in each epoch, across epochs without a seam."""

    def __init__(self, data: ExampleData, micro_batch_size: int) -> None:
        self._data, self._micro_batch_size = data, micro_batch_size
        self._row = 0  # the next, over all epochs
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __next__(self) -> PackedBatch:
        rows = [self._row_at(at) for at in range(self._row, self._row + self._micro_batch_size)]
        self._row += self._micro_batch_size
        return self._data.training_batch(rows)

    def _row_at(self, at: int) -> int:
        epoch, place = divmod(at, self._data.num_sequences)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._data.row_order(epoch)
        return int(self._order[place])

    def state_dict(self) -> dict[str, Any]:
        return {"row": self._row, **self._data.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where state_dict was taken; the batch size may differ. Raises UserError for other data."""
        for name, value in self._data.identity.items():
            if state.get(name) != value:
                raise UserError(
                    f"the position in the examples was saved with {name} {state.get(name)!r}, this run has {value!r}; "
                    "go on with the same data and settings, or start a new run"
                )
        self._row = state["row"]


def _bytes(unit: Unit) -> bytes:
    parts = ((np.array(e.ids, dtype=np.int64).tobytes(), np.array(e.is_answer).tobytes()) for e in unit)
    return b"".join(itertools.chain.from_iterable(parts))


def _hash(unit: Unit) -> int:
    return xxhash.xxh3_64_intdigest(_bytes(unit))
