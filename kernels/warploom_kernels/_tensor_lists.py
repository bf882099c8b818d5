"""Many tensors in one launch: tables of addresses by which a program finds its piece of its tensor. The tables are kept
while the addresses stay, so that a training step sends nothing to the card."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

PIECE = 4096  # elements of one program

_tables: OrderedDict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = OrderedDict()


def tables(lists: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return, on the device of the tensors, those of the last few calls kept:

    addresses (len(lists), n) int64, 0 for empty tensors and lists; sizes (n,) int64, elements of the first list's
    tensors; pieces (programs, 2) int32, which tensor and which PIECE of it.
    """
    sizes = [tensor.numel() for tensor in lists[0]]
    addresses = [[tensor.data_ptr() for tensor in tensors] or [0] * len(sizes) for tensors in lists]
    key = (*sizes, *(address for row in addresses for address in row), lists[0][0].get_device())
    if key in _tables:
        _tables.move_to_end(key)
        return _tables[key]
    pieces = [(i, piece) for i, size in enumerate(sizes) for piece in range(triton.cdiv(size, PIECE))]
    device = lists[0][0].device
    table = (
        torch.tensor(addresses, dtype=torch.int64).to(device),
        torch.tensor(sizes, dtype=torch.int64).to(device),
        torch.tensor(pieces, dtype=torch.int32).reshape(-1, 2).to(device),
    )
    _tables[key] = table
    if len(_tables) > 16:
        _tables.popitem(last=False)
    return table
