"""Checksums of tensors' bits, computed where the tensors are: of what each process puts into collectives, to tell which
was the first to compute something else than before; and of the weights, to compare replicas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from warploom.parallel.watched import looked_at, put_in

if TYPE_CHECKING:
    from warploom.parallel.mesh import Mesh

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """Return a view of the tensor's bits as integers of the same shape: there a NaN is equal to itself, and zeros of
    two signs are not equal."""
    return tensor.detach().view(_INTEGERS[tensor.element_size()])


def checksum(tensor: Tensor) -> Tensor:
    """Return the sum of the bits as integers, modulo 2**64, a scalar: one flipped bit always changes it."""
    return bits(tensor).sum(dtype=torch.int64)


class CrossCheck:
    """How processes compare their results. exchange returns what each of them gives, by rank; all must call alike."""

    def __init__(self, mesh: Mesh, exchange: Callable[[Any], list[Any]]) -> None:
        self._mesh, self._exchange = mesh, exchange

    @contextmanager
    def listening(self) -> Iterator[list[Tensor]]:
        """Give a list that grows, for the length of a with block, by a checksum of all that this process puts into
        collectives."""
        found: list[Tensor] = []
        # A thread that saves speaks over a group apart.
        besides = self._mesh.__dict__.get("side_group")

        def look(name: str, group: dist.ProcessGroup, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if besides is None or group.group_name != besides.group_name:
                found.extend(map(checksum, put_in(name, args)))

        with looked_at(look):
            yield found

    def who_differs(
        self, names: Sequence[str], first: Iterable[Tensor], again: Iterable[Tensor]
    ) -> tuple[list[int], list[str]]:
        """Return which ranks computed something else the second time, and the names of what differs on any.

        names: what differs here. first, again: what was put into collectives each time. What one process computes wrong
        reaches the others through those: so it was the one whose contribution differs first. The stages of a pipeline
        do not have the same collectives, so there every rank on which something differs is named.
        """
        pairs = zip(map(int, first), map(int, again), strict=False)
        place = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
        said = self._exchange([place, list(names)])
        all_names = list(dict.fromkeys(name for _, names in said for name in names))
        places = [place for place, _ in said if place is not None]
        if places and self._mesh.axis["pipeline"].size == 1:
            return [rank for rank, (place, _) in enumerate(said) if place == min(places)], all_names
        return [rank for rank, (place, names) in enumerate(said) if names or place is not None], all_names

    def unlike_replicas(self, tensors: Sequence[Tensor]) -> list[int]:
        """Return the places of the tensors whose bits are not the same on all replicas of any process."""
        axis = self._mesh.axis["data"]
        if axis.size == 1:
            return []
        least = torch.stack([checksum(tensor) for tensor in tensors])
        most = least.clone()
        dist.all_reduce(least, dist.ReduceOp.MIN, group=axis.group)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=axis.group)
        return (least != most).nonzero().flatten().tolist()
