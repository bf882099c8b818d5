"""Many tensors in one launch: tables of addresses by which a program finds its piece of its tensor. The tables are kept
while the addresses stay, so that a training step sends nothing to the card.

A CUDA graph reads the tables at each replay, so what is used while one is captured is kept for good. Made then, a table
is copied by the graph itself: it is filled at the first replay, and no call outside of the graph may find it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

PIECE = 4096  # elements of one program

Tables = tuple[Tensor, Tensor, Tensor]

_tables: OrderedDict[tuple[int, ...], Tables] = OrderedDict()
_NUM_KEPT = 16
_captured: list[tuple[Tensor, ...]] = []  # and the memory of the host that they are copied from


def tables(lists: Sequence[Sequence[Tensor]]) -> Tables:
    """Return, on the device of the tensors, those of the last few calls kept:

    addresses (len(lists), n) int64, 0 for empty tensors and lists; sizes (n,) int64, elements of the first list's
    tensors; pieces (programs, 2) int32, which tensor and which PIECE of it.
    """
    sizes = [tensor.numel() for tensor in lists[0]]
    addresses = [[tensor.data_ptr() for tensor in tensors] or [0] * len(sizes) for tensors in lists]
    key = (*sizes, *(address for row in addresses for address in row), lists[0][0].get_device())
    device = lists[0][0].device
    is_captured = _is_captured(device)
    if key in _tables:
        _tables.move_to_end(key)
        if is_captured:
            _captured.append(_tables[key])
        return _tables[key]
    pieces = [(i, piece) for i, size in enumerate(sizes) for piece in range(triton.cdiv(size, PIECE))]
    host = [
        torch.tensor(addresses, dtype=torch.int64),
        torch.tensor(sizes, dtype=torch.int64),
        torch.tensor(pieces, dtype=torch.int32).reshape(-1, 2),
    ]
    if is_captured:
        host = [table.pin_memory() for table in host]  # what a graph can copy from
    first, second, third = (table.to(device, non_blocking=is_captured) for table in host)
    made = (first, second, third)
    if is_captured:
        _captured.append((*host, *made))
        return made
    _tables[key] = made
    if len(_tables) > _NUM_KEPT:
        _tables.popitem(last=False)
    return made


def _is_captured(device: torch.device) -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
