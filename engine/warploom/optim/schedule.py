"""The learning rate over a run, as a fraction of its peak: a warm-up, then a cosine, a trapezoid or a constant."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from warploom.errors import UserError


@dataclass(frozen=True)
class ScheduleConfig:
    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """Shape after the warm-up: cosine decay, warm-up-stable-decay (constant, then linear decay), or constant."""
    warmup_steps: int | None = None
    """Steps of linear warm-up from 0; None takes a tenth of the run, at most 100 steps."""
    decay_fraction: float = 0.2
    """Share of the run, at its end, over which wsd decays."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end of the run, as a fraction of its peak (cosine and wsd)."""

    def __post_init__(self) -> None:
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise UserError(f"schedule.warmup_steps is {self.warmup_steps}; give 0 or more")
        if not 0 < self.decay_fraction <= 1:
            raise UserError(f"schedule.decay_fraction is {self.decay_fraction}; give a fraction above 0, up to 1")
        if not 0 <= self.min_lr_ratio <= 1:
            raise UserError(f"schedule.min_lr_ratio is {self.min_lr_ratio}; give a fraction from 0 to 1")


def lr_multiplier(config: ScheduleConfig, step: int, num_steps: int) -> float:
    """Return the factor on the peak learning rate for update `step` (from 0) of a run of num_steps updates.

    The first update already moves (1 / warmup_steps of the peak), the last one runs at min_lr_ratio.
    """
    warmup = min(100, num_steps // 10) if config.warmup_steps is None else config.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if config.kind == "constant":
        return 1.0
    start = warmup
    if config.kind == "wsd":
        start = max(warmup, num_steps - round(config.decay_fraction * num_steps))
    # The first update of the decay is still at the peak, so the decay has one interval less than it has updates.
    progress = min(1.0, max(0.0, (step - start) / max(1, num_steps - 1 - start)))
    fall = 0.5 * (1 - math.cos(math.pi * progress)) if config.kind == "cosine" else progress
    return 1 - (1 - config.min_lr_ratio) * fall
