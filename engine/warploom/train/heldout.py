"""The loss on text that was not trained on: nats per token, perplexity, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from warploom.train.batches import Batch, inputs_to, num_losses


@dataclass(frozen=True)
class HeldoutLoss:
    loss: float
    """Mean over the targets, nats."""
    num_targets: int
    num_bytes: int | None
    """UTF-8 bytes of text behind the targets; None where the data does not know them."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # e^710 is past the largest float

    @property
    def bits_per_byte(self) -> float:
        """The loss in a unit that does not depend on the tokenizer; nan without num_bytes."""
        return self.loss * self.num_targets / math.log(2) / self.num_bytes if self.num_bytes else math.nan


@torch.no_grad()
def heldout_loss(
    loss_sum: Callable[..., Tensor],
    batches: Iterable[Batch],
    device: torch.device,
    *,
    stop: Callable[[], bool] | None = None,
) -> HeldoutLoss | None:
    """Return the mean loss over all targets of batches, or None as soon as stop() says so.

    loss_sum as in training_step; its model must be in evaluation mode.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    num_targets = 0
    num_bytes: int | None = 0
    for batch in batches:
        if stop is not None and stop():
            return None
        total += loss_sum(**inputs_to(batch, device))
        num_targets += num_losses(batch)
        batch_bytes = getattr(batch, "num_bytes", None)
        num_bytes = None if num_bytes is None or batch_bytes is None else num_bytes + batch_bytes
    return HeldoutLoss(float(total) / num_targets if num_targets else math.nan, num_targets, num_bytes)
