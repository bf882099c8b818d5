"""Silent corruption: what a faulty processor or memory computes wrong without a word. A step's gradients that are
computed twice from the same state must be the same bits, and so must the weights of replicas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from warploom.checkpoint import rng
from warploom.errors import UserError
from warploom.optim.parts import local_part
from warploom.parallel.checksums import bits
from warploom.train.step import Processes

if TYPE_CHECKING:
    from warploom.parallel.checksums import CrossCheck

_NAMES_SAID = 3


class CorruptionFound(UserError):
    """The same computation gave two results, or replicas have other weights. The step was not made."""


class ComputedTwice:
    """A train.step.Processes that has another compute the gradients twice, and compares them bit for bit.

    named: the parameters on this process. step: the number of the step. cross_check: for many processes, which all find
    out together; the weights of replicas are compared as well. It takes the time of another forward and backward pass,
    and the memory of the gradients once more.
    """

    def __init__(
        self,
        processes: Processes,
        named: Sequence[tuple[str, nn.Parameter]],
        step: int,
        cross_check: CrossCheck | None = None,
    ) -> None:
        self._processes, self._named, self._step, self._cross_check = processes, named, step, cross_check

    def accumulate(self, loss_sum: Callable[..., Tensor], batches: list[dict[str, Any]], num_targets: int) -> Tensor:
        """As the other's. Raises CorruptionFound on every process if one of them got two results."""
        if self._cross_check is not None:
            self._require_like_replicas(self._cross_check)
        random_states = rng.capture()

        def compute() -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
            for _, parameter in self._named:
                parameter.grad = None
            with self._listening() as put_in:
                loss = self._processes.accumulate(loss_sum, batches, num_targets)
            return loss, [parameter.grad for _, parameter in self._named], put_in

        first_loss, first_grads, first_put_in = compute()
        rng.restore(*random_states)
        loss, grads, put_in = compute()
        names = [] if _is_same(first_loss, loss) else ["the loss"]
        for (name, _), first, again in zip(self._named, first_grads, grads, strict=True):
            if not _is_same(first, again):
                names.append(f"the gradient of {name}")
        ranks = [0]
        if self._cross_check is not None:
            ranks, names = self._cross_check.who_differs(names, first_put_in, put_in)
        if names:
            raise CorruptionFound(
                f"step {self._step} was computed twice from the same state, and rank {' and '.join(map(str, ranks))} "
                f"did not get the same bits: {_some_of(names)}; its processor or memory is faulty, or an operation is "
                "not deterministic. Nothing of the step was kept: go on from the last checkpoint, on another machine"
            )
        return loss

    def totals(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor]:
        return self._processes.totals(loss, parameters)

    def _listening(self) -> AbstractContextManager[list[Tensor]]:
        return nullcontext([]) if self._cross_check is None else self._cross_check.listening()

    def _require_like_replicas(self, cross_check: CrossCheck) -> None:
        unlike = cross_check.unlike_replicas([local_part(parameter) for _, parameter in self._named])
        _, names = cross_check.who_differs([self._named[place][0] for place in unlike], (), ())
        if names:
            raise CorruptionFound(
                f"before step {self._step} the replicas did not have the same weights any more: {_some_of(names)}; a "
                "processor or memory is faulty. Nothing of the step was kept: go on from a checkpoint of before"
            )


def _is_same(first: Tensor | None, again: Tensor | None) -> bool:
    if first is None or again is None:
        return first is again
    return torch.equal(bits(local_part(first)), bits(local_part(again)))


def _some_of(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SAID
    return ", ".join(names[:_NAMES_SAID]) + (f" and {more} more" if more > 0 else "")
