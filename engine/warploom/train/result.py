"""How a run ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainResult:
    """What Trainer.fit returns."""

    steps: int
    tokens: int
    skipped_steps: int
    heldout_loss: float
    """Of the last evaluation, nats per token; nan if there was none."""
    bits_per_byte: float
    best_heldout_loss: float
    stopped_because: str
    stop_signal: int | None
    """SIGINT or SIGTERM if one ended the run."""
    checkpoint: Path | None
    """The last one, of the weights the model has now; None if a signal came before the first step."""
    best_checkpoint: Path | None
    warnings: tuple[str, ...]
    """What the curve says about overfitting and underfitting."""
