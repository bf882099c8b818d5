"""The training step, and nothing else: what the trainer does around it is in trainer.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from warploom.ops import grad_norm
from warploom.train.batches import Batch, inputs_to, num_losses


class StepOutcome(NamedTuple):
    loss: float  # mean over the targets of the global batch, nats
    grad_norm: float  # before clipping
    num_targets: int
    skipped: bool  # not finite, or refused: weights, moments and update count are as before


class ClippingOptimizer(Protocol):
    """An optimizer that clips on the way: its step counts each gradient grad_factor times."""

    def step(self, closure: None = None, *, grad_factor: float = 1.0) -> object: ...


class Processes(Protocol):
    """Where the model is: in one process, or in parts on many (parallel.apply.ParallelModel)."""

    def accumulate(self, loss_sum: Callable[..., Tensor], batches: list[dict[str, Any]], num_targets: int) -> Tensor:
        """Leave the gradients of the batches' summed loss / num_targets in .grad; return this process's share of it."""

    def totals(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor]:
        """Return the loss and the norm of the gradient, over all processes."""


class OneProcess:
    def accumulate(self, loss_sum: Callable[..., Tensor], batches: list[dict[str, Any]], num_targets: int) -> Tensor:
        loss = torch.zeros((), device=batches[0]["tokens"].device)
        for inputs in batches:
            # Dividing by the count of the whole global batch makes the split invisible: a mean of means would not be.
            micro_loss = loss_sum(**inputs) / num_targets
            micro_loss.backward()
            loss += micro_loss.detach()
        return loss

    def totals(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor]:
        return loss, grad_norm([p.grad for p in parameters if p.grad is not None])


ONE_PROCESS = OneProcess()


def training_step(
    loss_sum: Callable[..., Tensor],
    micro_batches: Sequence[Batch],
    parameters: Sequence[nn.Parameter],
    optimizers: Sequence[ClippingOptimizer],
    *,
    grad_clip: float,
    processes: Processes = ONE_PROCESS,
    refuses: Callable[[float, float], bool] = lambda loss, grad_norm: False,
) -> StepOutcome:
    """Make one update from the mean loss over all targets of the micro batches, however they are split.

    loss_sum(tokens, targets, **inputs) returns the sum of the losses of one micro batch's targets, a scalar. A loss or
    gradient that is not finite makes no update; neither does a batch without targets, whose mean is 0 / 0.
    Nor is one made where refuses(loss, grad_norm), which is asked of what is finite.
    With several processes micro_batches is the whole global batch on each, and each takes its share; refuses must
    answer alike on all.
    """
    device = parameters[0].device
    num_targets = sum(map(num_losses, micro_batches))
    for parameter in parameters:
        parameter.grad = None
    loss = processes.accumulate(loss_sum, [inputs_to(batch, device) for batch in micro_batches], num_targets)
    loss, norm = processes.totals(loss, parameters)
    # One read of both for the host: a step that is not finite must not reach the optimizers.
    loss_value, norm_value = torch.stack((loss, norm)).tolist()
    is_finite = math.isfinite(loss_value) and math.isfinite(norm_value)
    skipped = not is_finite or refuses(loss_value, norm_value)
    if not skipped:
        # Clipping is a factor on the gradients, which the optimizers take along: the gradients themselves stay.
        clip_factor = min(1.0, grad_clip / (norm_value + 1e-6)) if grad_clip else 1.0
        for optimizer in optimizers:
            optimizer.step(grad_factor=clip_factor)
    return StepOutcome(loss_value, norm_value, num_targets, skipped)
