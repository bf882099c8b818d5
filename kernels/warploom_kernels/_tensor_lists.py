"""Many tensors in one launch: tables of addresses by which a program finds its piece of its tensor. The tables are kept
while the addresses stay, so that a training step sends nothing to the card.

A CUDA graph reads the tables at each replay, so what is used while one is captured is kept for good. Made then, a table
is copied by the graph itself: it is filled at the first replay, and no call outside of the graph may find it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 4096  # elements of one program
_WIDTH = 16


class Tables(NamedTuple):
    addresses: Tensor  # (lists, n) int64: of each tensor; 0 for empty tensors and lists
    sizes: Tensor  # (n,) int64: elements of the first list's tensors
    pieces: Tensor  # (programs, 2) int32: which tensor, and which PIECE of it
    is_even: bool  # every address and size is a multiple of 16, so that threads may load 16 bytes at once

    @property
    def arguments(self) -> dict[str, Any]:
        """What a kernel takes of them."""
        return {"addresses": self.addresses, "sizes": self.sizes, "pieces": self.pieces, "EVEN": self.is_even}


@triton.jit
def load_address(address, POINTER: tl.constexpr, EVEN: tl.constexpr):
    """The address as a pointer, of which the compiler knows that it is a multiple of 16 if it is."""
    pointer = tl.load(address).to(POINTER)
    if EVEN:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load_size(size, EVEN: tl.constexpr):
    number = tl.load(size)
    if EVEN:
        number = tl.multiple_of(number, 16)
    return number


_tables: OrderedDict[tuple[int, ...], Tables] = OrderedDict()
_NUM_KEPT = 16
_captured: list[tuple[Tensor, ...]] = []  # and the memory of the host that they are copied from


def tables(lists: Sequence[Sequence[Tensor]]) -> Tables:
    """Return the tables of lists of tensors, on the device of these. Those of the last few calls are kept."""
    sizes = [tensor.numel() for tensor in lists[0]]
    addresses = [[tensor.data_ptr() for tensor in tensors] or [0] * len(sizes) for tensors in lists]
    device = lists[0][0].device
    numbers = (*sizes, *(address for row in addresses for address in row))
    key = (*numbers, lists[0][0].get_device())
    is_captured = _is_captured(device)
    if key in _tables:
        _tables.move_to_end(key)
        if is_captured:
            _captured.append(_tables[key][:3])
        return _tables[key]
    pieces = [(i, piece) for i, size in enumerate(sizes) for piece in range(triton.cdiv(size, PIECE))]
    host = [
        torch.tensor(addresses, dtype=torch.int64),
        torch.tensor(sizes, dtype=torch.int64),
        torch.tensor(pieces, dtype=torch.int32).reshape(-1, 2),
    ]
    if is_captured:
        host = [table.pin_memory() for table in host]  # what a graph can copy from
    is_even = not any(number % _WIDTH for number in numbers)
    first, second, third = (table.to(device, non_blocking=is_captured) for table in host)
    made = Tables(first, second, third, is_even)
    if is_captured:
        _captured.append((*host, *made[:3]))
        return made
    _tables[key] = made
    if len(_tables) > _NUM_KEPT:
        _tables.popitem(last=False)
    return made


def _is_captured(device: torch.device) -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
