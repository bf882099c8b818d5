"""`warploom finetune`: go on from a trained model, on conversations, preferences or text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from warploom.cli.train import show_samples
from warploom.errors import UserError
from warploom.finetune.config import FinetuneConfig
from warploom.finetune.run import FinetuneRun, finetune
from warploom.optim import OptimizerConfig, ScheduleConfig
from warploom.train.config import TrainConfig
from warploom.train.monitor import format_duration


@dataclass(frozen=True)
class Command:
    """Go on from a trained model: in full, some layers of it, or adapters beside it (LoRA)."""

    base: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="BASE")]
    """A step-... folder, or a run folder, whose newest sound checkpoint is taken."""
    data: tuple[str, ...] = ()
    """Files of examples (.jsonl, also .gz .zst .xz): messages, or prompt and response, or chosen and rejected; or text
    as `warploom train` takes it."""
    config: Path | None = None
    """A TOML file with the settings below, as [tune], [train], [optimizer], [schedule]; flags win over it."""
    tune: FinetuneConfig = field(default_factory=FinetuneConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(out_dir=Path("finetune")))
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(name="adamw", lr=1e-4, weight_decay=0.0))
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def run(self) -> int:
        if not self.data:
            raise UserError("no data was given; name files of examples with --data")
        done = finetune(
            self.base,
            self.data,
            self.tune,
            self.train,
            self.optimizer,
            self.schedule,
            console=Console(soft_wrap=True),
        )
        if done.result.stop_signal is not None:
            print(f"The checkpoint is {done.result.checkpoint}; the same command goes on from there.")
            return 128 + done.result.stop_signal
        show(done)
        return 0


def show(done: FinetuneRun) -> None:
    """Print the samples, the figures and where the results are."""
    show_samples(done.samples)
    print(
        f"\nHeld-out loss {done.result.heldout_loss:.4f} after {done.result.steps:,} steps; "
        f"{format_duration(done.wall_s)} in all."
    )
    print(f"Checkpoint: {done.result.checkpoint}")
    if done.merged is not None:
        print(f"Merged:     {done.merged}")
    print(f"Report:     {done.report}")
