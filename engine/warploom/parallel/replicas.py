"""Replicas with whole weights: their gradients are summed in buckets, while the backward pass is still at work.

Nothing has to be gathered, so parameters stay plain tensors, and what is kept of them from step to step (packed
weights) stays true. Where weights lie in parts, fully_shard sums instead (shard.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from warploom.parallel.mesh import Axis

BUCKET_BYTES = 25 << 20  # as in Li et al., 2020: large enough for the links, small enough to be on the way early

BeginSum = Callable[[Tensor], Callable[[], object]]
"""Begins to replace a flat tensor by its sum over processes, and returns what waits until that is done."""


class Buckets:
    """Sums the .grad of parameters over processes, which all must have gradients for the same ones.

    start() goes before the last backward pass of a step, arrived(parameter) is called in it when a gradient is there,
    finish() behind it. A bucket is sent when it has all its gradients, in the same order on every process; .grad then
    is a view into it.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], begin_sum: BeginSum, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        self._begin_sum = begin_sum
        self._buckets = list(_buckets(parameters, bucket_bytes))
        self._bucket_of: dict[Tensor, int] = {p: index for index, bucket in enumerate(self._buckets) for p in bucket}
        self._missing: list[int] = []  # gradients that each bucket waits for; empty before start
        self._waits: list[Callable[[], object]] = []  # for each bucket that is on its way

    @property
    def num_sent(self) -> int:
        return len(self._waits)

    def start(self) -> None:
        """Take gradients that arrive from now on for final."""
        self._missing = [len(bucket) for bucket in self._buckets]

    def arrived(self, parameter: Tensor) -> None:
        """A hook for nn.Parameter.register_post_accumulate_grad_hook; before start() it does nothing."""
        if not self._missing:
            return
        self._missing[self._bucket_of[parameter]] -= 1
        while self.num_sent < len(self._buckets) and self._missing[self.num_sent] == 0:
            self._send_next()

    def finish(self) -> None:
        """Leave the sums in .grad. A parameter without a gradient stays without."""
        while self.num_sent < len(self._buckets):
            self._send_next()
        for wait in self._waits:
            wait()
        self._missing, self._waits = [], []

    def _send_next(self) -> None:
        grads = {p: p.grad for p in self._buckets[self.num_sent] if p.grad is not None}
        if not grads:
            self._waits.append(lambda: None)
            return
        flat = torch.cat([grad.reshape(-1) for grad in grads.values()])
        for parameter, grad in zip(grads, flat.split([p.numel() for p in grads]), strict=True):
            parameter.grad = grad.view(parameter.shape)
        self._waits.append(self._begin_sum(flat))


def begin_all_reduce(flat: Tensor, axis: Axis) -> Callable[[], object]:
    """A BeginSum over an axis, in the order that the back end of torch.distributed takes."""
    return dist.all_reduce(flat, group=axis.group, async_op=True).wait


def _buckets(parameters: Sequence[nn.Parameter], num_bytes: int) -> Iterator[list[nn.Parameter]]:
    """Parameters that become one message: neighbours of one dtype, the last, which backward reaches first, in front."""
    bucket: list[nn.Parameter] = []
    for parameter in reversed(parameters):
        held = sum(p.nbytes for p in bucket)
        if bucket and (held + parameter.nbytes > num_bytes or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
