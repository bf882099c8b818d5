"""The rows of a batch, given as the arguments of Transformer.loss: cut out, and filled up with rows that do not count.

Every process reads the whole global batch, which is a few megabytes of token ids, and takes its rows. So the order of
the data knows nothing of processes, and a run goes on with another number of them exactly where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from warploom.data.loader import IGNORE_INDEX
from warploom.parallel.mesh import split_sizes

Inputs = dict[str, Any]


def micro_batches(
    inputs: Inputs,
    num_parts: int,
    part: int,
    size: int,
    *,
    same_size: bool,
    number: Callable[[int], int] | None = None,
) -> list[Inputs]:
    """Return this part's rows of a batch in micro batches of at most size rows, equally many on every part.

    same_size: every micro batch has exactly size rows, the missing ones without targets; otherwise only one that would
    be empty has such a row. number: how many micro batches to make where so many are needed, or more.
    """
    sizes = split_sizes(len(inputs["tokens"]), num_parts)
    first, last = sum(sizes[:part]), sum(sizes[: part + 1])
    batches = []
    needed = math.ceil(sizes[0] / size)
    for index in range(needed if number is None else number(needed)):
        start = min(last, first + index * size)
        stop = min(last, start + size)
        missing = size - (stop - start) if same_size else int(start == stop)
        batches.append(_with_blank_rows(inputs, start, stop, missing))
    return batches


def take_rows(inputs: Inputs, start: int, stop: int) -> Inputs:
    """Return rows start to stop of the arguments of Transformer.loss."""
    T = inputs["tokens"].shape[1]
    taken = {}
    for name, x in inputs.items():
        if name == "cu_seqlens":
            # Each row begins a document, so the cut is at one of the offsets.
            taken[name] = x[(x >= start * T) & (x <= stop * T)] - start * T
        else:
            taken[name] = x if name == "positions" and x.dim() == 1 else x[start:stop]
    return taken


def _with_blank_rows(inputs: Inputs, start: int, stop: int, missing: int) -> Inputs:
    taken = take_rows(inputs, start, stop)
    if not missing:
        return taken
    blank = take_rows(inputs, 0, 1)
    blank["targets"] = torch.full_like(blank["targets"], IGNORE_INDEX)
    for _ in range(missing):
        taken = {name: _joined(name, x, blank[name]) for name, x in taken.items()}
    return taken


def _joined(name: str, x: Tensor, more: Tensor) -> Tensor:
    if name == "cu_seqlens":
        return torch.cat([x, more[1:] + x[-1]]) if len(x) > 1 else more
    return x if name == "positions" and x.dim() == 1 else torch.cat([x, more])
