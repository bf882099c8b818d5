"""Gradients summed over a binary tree whose leaves are the micro batches, so that the bits of the sum do not depend on
how many replicas there are.

Sums of floating-point numbers depend on their order. Here it is fixed: the sum over micro batches i to j is that of the
first half plus that of the second. Where the replicas are a power of two, each has a whole subtree, and the processes
add what is left of the tree: neighbours first, then pairs of neighbours. Dropout depends on the step and the micro
batch, not on who computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from warploom.errors import UserError
from warploom.ops import grad_norm
from warploom.parallel import heartbeat

if TYPE_CHECKING:
    from warploom.parallel.mesh import Axis


class TreeSum:
    """A train.step.Processes of replicas that all have the whole model; with axis None, of one process alone.

    Each is given all micro batches of a step, and takes its share of them. seed_of() is the seed of the step that
    begins.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], seed_of: Callable[[], int], axis: Axis | None) -> None:
        self._parameters, self._seed_of, self._axis = parameters, seed_of, axis
        self._size, self._index = (1, 0) if axis is None else (axis.size, axis.index)

    def accumulate(self, loss_sum: Callable[..., Tensor], batches: list[dict[str, Any]], num_targets: int) -> Tensor:
        """Leave the gradients of the batches' summed loss / num_targets in .grad, and return that loss: the same bits
        on every process, and for every number of them."""
        num_leaves = len(batches) // self._size
        first, seed = self._index * num_leaves, self._seed_of()

        def leaf(index: int) -> list[Tensor]:
            torch.manual_seed((seed + index) % 2**63)
            heartbeat.report(part="forward")
            loss = loss_sum(**batches[index]) / num_targets
            heartbeat.report(part="backward")
            loss.backward()
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
            for parameter in self._parameters:
                parameter.grad = None
            return [*grads, loss.detach()]

        def tree(start: int, stop: int) -> list[Tensor]:
            if stop - start == 1:
                return leaf(start)
            middle = _middle(start, stop)
            sums = tree(start, middle)
            torch._foreach_add_(sums, tree(middle, stop))
            return sums

        sums = tree(first, first + num_leaves)
        heartbeat.report(part="exchange")
        if self._axis is not None and self._size > 1:
            _sum_over(sums, self._axis)
        for parameter, grad in zip(self._parameters, sums, strict=False):
            parameter.grad = grad
        torch.manual_seed(seed % 2**63)  # the state that a checkpoint keeps is that of all processes
        return sums[-1]

    def totals(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor]:
        return loss, grad_norm([p.grad for p in parameters if p.grad is not None])


def step_seed(seed: int, step: int) -> int:
    """Return a seed for a step, those after it being for its micro batches."""
    return (seed * 1_000_003 + step) * 1_000_003


def check(num_micro_batches: int, replicas: int) -> None:
    """Raise UserError unless each of so many replicas gets a subtree of the tree over the micro batches."""
    if replicas & (replicas - 1) or num_micro_batches % replicas:
        allowed = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if num_micro_batches % n == 0]
        raise UserError(
            f"train.deterministic 'elastic' sums {num_micro_batches} micro batches in a tree, which {replicas} "
            f"replicas cannot share; give parallel.data {' or '.join(map(str, allowed))}, or another "
            "train.micro_batch_size"
        )


def _middle(start: int, stop: int) -> int:
    return (start + stop) // 2


def _sum_over(tensors: list[Tensor], axis: Axis) -> None:
    """Replace each tensor by its sum over the axis, whose size is a power of two, in the order of the tree.

    Each round, process i and its partner i ^ distance exchange the halves of what they are still in charge of, and each
    adds up one; then the sums go back the same way (recursive halving and doubling, Thakur et al., 2005). What travels
    is what any all-reduce sends at least.
    """
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    missing = -flat.numel() % axis.size
    flat = torch.cat([flat, flat.new_zeros(missing)]) if missing else flat
    part, rounds = flat, []
    distance = 1
    while distance < axis.size:
        lower, upper = part.chunk(2)
        keeps_lower = not axis.index & distance
        kept, given = (lower, upper) if keeps_lower else (upper, lower)
        received = torch.empty_like(kept)
        _exchange(given, received, axis, distance)
        kept.add_(received)
        rounds.append((kept, given, distance))
        part, distance = kept, 2 * distance
    for kept, given, distance in reversed(rounds):
        _exchange(kept, given, axis, distance)
    for tensor, summed in zip(tensors, flat.split([*map(Tensor.numel, tensors), missing]), strict=False):
        tensor.copy_(summed.view(tensor.shape))


def _exchange(sent: Tensor, received: Tensor, axis: Axis, distance: int) -> None:
    partner = dist.get_global_rank(axis.group, axis.index ^ distance)
    operations = [
        dist.P2POp(dist.isend, sent.contiguous(), partner, axis.group),
        dist.P2POp(dist.irecv, received, partner, axis.group),
    ]
    for request in dist.batch_isend_irecv(operations):
        request.wait()
