"""Gradients summed over a binary tree whose leaves are the micro batches, so that the bits of the sum do not depend on
how many replicas there are.

Sums of floating-point numbers depend on their order. Here it is fixed: the sum over micro batches i to j is that of the
first half plus that of the second. Where the replicas are a power of two, each has a whole subtree, and the processes
add what is left of the tree: neighbours first, then pairs of neighbours. Dropout depends on the step and the micro
batch, not on who computes it.

Each gradient is added where it belongs when backward has just made it, and travels while backward makes the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from warploom.errors import UserError
from warploom.ops import grad_norm
from warploom.parallel import heartbeat
from warploom.parallel.replicas import Buckets

if TYPE_CHECKING:
    from warploom.parallel.mesh import Axis

# torch 2.13 deprecates the name before it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class TreeSum:
    """A train.step.Processes of replicas that all have the whole model; with axis None, of one process alone.

    Each is given all micro batches of a step, and takes its share of them. seed_of() is the seed of the step that
    begins.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], seed_of: Callable[[], int], axis: Axis | None) -> None:
        self._parameters, self._seed_of = parameters, seed_of
        self._size, self._index = (1, 0) if axis is None else (axis.size, axis.index)
        self._exchange = None if axis is None or axis.size == 1 else TreeExchange(axis)
        self._buckets = None if self._exchange is None else Buckets(parameters, self._exchange.begin)
        # Of each parameter the sums whose second half is to come; None while no backward pass is this object's.
        self._open: dict[Tensor, list[Tensor]] | None = None
        self._absent: set[Tensor] = set()  # parameters whose gradient it has not brought yet
        self._num_complete, self._is_last = 0, False
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def accumulate(self, loss_sum: Callable[..., Tensor], batches: list[dict[str, Any]], num_targets: int) -> Tensor:
        """Leave the gradients of the batches' summed loss / num_targets in .grad, and return that loss: the same bits
        on every process, and for every number of them."""
        num_leaves = len(batches) // self._size
        first, seed = self._index * num_leaves, self._seed_of()
        open_sums: dict[Tensor, list[Tensor]] = {parameter: [] for parameter in self._parameters}
        open_losses: list[Tensor] = []
        for leaf, num_complete in enumerate(_complete_with(0, num_leaves)):
            torch.manual_seed((seed + first + leaf) % 2**63)
            heartbeat.report(part="forward")
            loss = loss_sum(**batches[first + leaf]) / num_targets
            heartbeat.report(part="backward")
            self._num_complete, self._is_last = num_complete, leaf == num_leaves - 1
            if self._is_last and self._buckets is not None:
                self._buckets.start()
            self._backward(loss, open_sums)
            open_losses.append(_add_up(open_losses, loss.detach(), num_complete))
        heartbeat.report(part="exchange")
        (loss,) = open_losses
        if self._buckets is not None and self._exchange is not None:
            self._buckets.finish()
            self._exchange.begin(loss.view(1))()
        torch.manual_seed(seed % 2**63)  # the state that a checkpoint keeps is that of all processes
        return loss

    def _backward(self, loss: Tensor, open_sums: dict[Tensor, list[Tensor]]) -> None:
        self._open, self._absent = open_sums, set(self._parameters)
        loss.backward()
        for parameter in self._parameters:
            if parameter in self._absent:
                parameter.grad = torch.zeros_like(parameter)
                self._arrived(parameter)
        self._open = None

    def _arrived(self, parameter: Tensor) -> None:
        """Add a micro batch's gradient to the sums that it completes."""
        if self._open is None:
            return
        assert parameter.grad is not None
        self._absent.remove(parameter)
        open_sums = self._open[parameter]
        grad = _add_up(open_sums, parameter.grad, self._num_complete)
        if not self._is_last:
            open_sums.append(grad)
            parameter.grad = None
            return
        parameter.grad = grad
        if self._buckets is not None:
            self._buckets.arrived(parameter)

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


def _complete_with(start: int, stop: int) -> list[int]:
    """Return for each micro batch of a subtree how many of its sums end with it."""
    if stop - start == 1:
        return [0]
    middle = _middle(start, stop)
    *others, last = _complete_with(middle, stop)
    return [*_complete_with(start, middle), *others, last + 1]


def _add_up(first_halves: list[Tensor], second: Tensor, times: int) -> Tensor:
    """Return second, added to the last of the first halves, which are sums over micro batches; that to the one before
    it; and so on. Those that were added to are taken from the list."""
    for _ in range(times):
        second = first_halves.pop().add_(second)
    return second


class TreeExchange:
    """begin is a replicas.BeginSum over an axis, whose size is a power of two, in the order of the tree.

    Process i adds up the i-th part of everyone's tensor, and everyone gets its sum: what travels is what any all-reduce
    sends at least, and the order is ours.
    """

    def __init__(self, axis: Axis) -> None:
        self._axis = axis
        self._last: _Exchange | None = None

    def begin(self, flat: Tensor) -> Callable[[], None]:
        if self._last is not None:
            self._last.add_up()  # the sums of the bucket before set out here, so on every process in this order
        self._last = _Exchange(flat, self._axis)
        return self._last.finish


class _Exchange:
    """One tensor on its way."""

    def __init__(self, flat: Tensor, axis: Axis) -> None:
        self._flat, self._axis = flat, axis
        missing = -flat.numel() % axis.size
        self._whole = F.pad(flat, (0, missing)) if missing else flat
        self._parts = torch.empty_like(self._whole)
        self._received = dist.all_to_all_single(self._parts, self._whole, group=axis.group, async_op=True)
        self._gathered: Any = None

    def add_up(self) -> None:
        if self._gathered is not None:
            return
        self._received.wait()
        mine = _tree_sum(list(self._parts.chunk(self._axis.size)))
        self._gathered = _all_gather(self._whole, mine, group=self._axis.group, async_op=True)

    def finish(self) -> None:
        self.add_up()
        self._gathered.wait()
        if self._whole is not self._flat:
            self._flat.copy_(self._whole[: self._flat.numel()])


def _tree_sum(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    middle = _middle(0, len(parts))
    return _tree_sum(parts[:middle]).add_(_tree_sum(parts[middle:]))
