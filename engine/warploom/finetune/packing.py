"""Rows of a fixed length out of examples of any: which go together, and the batch that holds each apart.

An example of n tokens is n - 1 inputs with their targets; what is no answer is no target. A unit is what must lie in
one row: an example, or the two sides of a pair. Attention keeps the examples of a row apart by cu_seqlens, and their
positions restart.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from warploom.data.chat import EncodedChat
from warploom.data.loader import IGNORE_INDEX

Unit = tuple[EncodedChat, ...]


@dataclass(frozen=True)
class PackedBatch:
    """tokens, targets, positions: (B, T) int64; cu_seqlens: (n + 1,) int32 offsets of examples and padding over the
    flattened B * T tokens. num_bytes: UTF-8 bytes of text behind the targets; None for pairs.

    pairs: (P, 2) int64, which of the n are the chosen and the rejected side of each pair. reference: (P, 2) float32,
    the log-probabilities of their answers under the base. num_losses: P. None where there are no pairs.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    num_bytes: int | None
    pairs: Tensor | None = None
    reference: Tensor | None = None
    num_losses: int | None = None


def cut_to(unit: Unit, seq_len: int) -> Unit | None:
    """Cut the examples of a unit so that they fit seq_len together, each to the same length at most; None if one then
    has no answer left.

    What stands before the first answer loses its beginning, but for its first token and for what fits a quarter of the
    length; then the end is cut. The sides of a pair keep the same beginning.
    """
    room = seq_len // len(unit) + 1
    if length(unit) > seq_len:
        excess = max(len(example.ids) for example in unit) - room
        before = min(_first_answer(example) for example in unit)
        drop = max(0, min(excess, before - 1 - room // 4))
        keep = [0, *range(1 + drop, room + drop)]
        unit = tuple(_kept(example, keep) for example in unit)
    return unit if all(any(example.is_answer[1:]) for example in unit) else None


def _kept(example: EncodedChat, places: Sequence[int]) -> EncodedChat:
    places = [place for place in places if place < len(example.ids)]
    return EncodedChat([example.ids[place] for place in places], [example.is_answer[place] for place in places])


def _first_answer(example: EncodedChat) -> int:
    return example.is_answer.index(True) if any(example.is_answer) else len(example.ids)


def length(unit: Unit) -> int:
    """Inputs that a unit takes of a row."""
    return sum(len(example.ids) - 1 for example in unit)


def pack(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Put units of these lengths, each at most seq_len, into few rows: best fit, the longest first. Returns the units
    of each row. The same lengths give the same rows."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for unit in sorted(range(len(lengths)), key=lambda unit: (-lengths[unit], unit)):
        at = bisect.bisect_left(free, (lengths[unit], -1))
        if at == len(free):
            rows.append([])
            left, row = seq_len, len(rows) - 1
        else:
            left, row = free.pop(at)
        rows[row].append(unit)
        bisect.insort(free, (left - lengths[unit], row))
    return rows


def stack(
    rows: Sequence[Sequence[Unit]],
    seq_len: int,
    token_bytes: np.ndarray | None,
    reference: Sequence[np.ndarray] | None = None,
) -> PackedBatch:
    """Lay rows of units out as a batch. token_bytes: (vocab_size,) bytes of text per token, for num_bytes. reference:
    (2,) float32 for each unit in turn; then units are pairs."""
    B, T = len(rows), seq_len
    tokens = np.zeros((B, T), dtype=np.int64)
    targets = np.full((B, T), IGNORE_INDEX, dtype=np.int64)
    positions = np.zeros((B, T), dtype=np.int64)
    starts: list[int] = []
    firsts: list[int] = []  # the first example of each unit
    for b, row in enumerate(rows):
        at = 0
        for unit in row:
            firsts.append(len(starts))
            for example in unit:
                ids = np.array(example.ids)
                end = at + len(ids) - 1
                tokens[b, at:end] = ids[:-1]
                targets[b, at:end] = np.where(example.is_answer[1:], ids[1:], IGNORE_INDEX)
                positions[b, at:end] = np.arange(end - at)
                starts.append(b * T + at)
                at = end
        if at < T:
            positions[b, at:] = np.arange(T - at)
            starts.append(b * T + at)
    batch = PackedBatch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.tensor([*starts, B * T], dtype=torch.int32),
        num_bytes=None if token_bytes is None else int(token_bytes[targets[targets != IGNORE_INDEX]].sum()),
    )
    if reference is None:
        return batch
    chosen = torch.tensor(firsts)
    return PackedBatch(
        batch.tokens,
        batch.targets,
        batch.positions,
        batch.cu_seqlens,
        None,
        pairs=torch.stack((chosen, chosen + 1), dim=1),
        reference=torch.from_numpy(np.stack(reference).astype(np.float32)),
        num_losses=len(firsts),
    )
