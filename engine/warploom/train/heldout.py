"""The loss on text that was not trained on: nats per token, perplexity, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from warploom.train.batches import IGNORE_INDEX, Batch, inputs_to


@dataclass(frozen=True)
class HeldoutLoss:
    loss: float
    """Mean over the targets, nats."""
    num_targets: int
    bytes_per_token: float
    """UTF-8 bytes of text behind a token; nan where the data does not know it."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # e^710 is past the largest float

    @property
    def bits_per_byte(self) -> float:
        """The loss in a unit that does not depend on the tokenizer."""
        return self.loss / (math.log(2) * self.bytes_per_token)


@torch.no_grad()
def heldout_loss(
    loss_sum: Callable[..., Tensor],
    batches: Iterable[Batch],
    device: torch.device,
    *,
    bytes_per_token: float = math.nan,
    stop: Callable[[], bool] = lambda: False,
) -> HeldoutLoss | None:
    """Return the mean loss over all targets of batches, or None as soon as stop() says so.

    loss_sum as in training_step; its model must be in evaluation mode.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    num_targets = 0
    for batch in batches:
        if stop():
            return None
        total += loss_sum(**inputs_to(batch, device))
        num_targets += int((batch.targets != IGNORE_INDEX).sum())
    return HeldoutLoss(float(total) / num_targets if num_targets else math.nan, num_targets, bytes_per_token)
