"""`warploom train`: train a model on text."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from warploom.errors import UserError
from warploom.evaluation.during_training import TasksDuringTraining
from warploom.models.config import TransformerConfig
from warploom.models.presets import preset
from warploom.optim import OptimizerConfig, ScheduleConfig
from warploom.parallel import ParallelConfig
from warploom.train.budget import parse_duration
from warploom.train.config import RunConfig, TrainConfig
from warploom.train.device import choose_device, choose_dtype
from warploom.train.estimate import estimate
from warploom.train.monitor import format_duration
from warploom.train.processes import is_first_process, joined
from warploom.train.report import Sample
from warploom.train.run import TextConfig, TextRun, train_on_text


@dataclass(frozen=True)
class Command:
    """Train a model on text. With --budget the model, batch and length are chosen; else set them below."""

    data: tuple[str, ...] = ()
    """Files, folders or globs (.txt .md .py .jsonl .parquet, also .gz .zst .xz), or one folder made by `warploom
    tokenize`; left out, the standard library of this Python."""
    budget: str | None = None
    """Time for the whole command, such as 90s, 10m or 1.5h: chooses the model, batch, vocabulary and steps for it."""
    preset: str | None = None
    """A model by name, such as nano, tiny, small or gpt2; --model.* changes parts of it."""
    config: Path | None = None
    """A TOML file with the settings below, as [model], [train], [optimizer], [schedule], [parallel], [text]; flags win
    over it."""
    tasks: tuple[str, ...] = ()
    """Benchmarks to score at each evaluation, such as arc_easy, separated by commas or spaces."""
    task_data: tuple[str, ...] = ()
    """tasks: folders of their files, or task=PATH, as `warploom eval` takes them."""
    task_items: int = 100
    """tasks: items of each, from the first; of MMLU, of each subject."""
    dry_run: bool = False
    """Print the configuration, parameters, FLOPs per token and memory, and stop."""
    model: TransformerConfig = field(default_factory=lambda: preset("small"))
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    text: TextConfig = field(default_factory=TextConfig)

    @staticmethod
    def expand_preset(name: str) -> dict[str, Any]:
        return {"model": dataclasses.asdict(preset(name))}

    def run(self) -> int:
        started = time.monotonic()
        if self.budget is not None and self.preset is not None:
            raise UserError(
                f"budget {self.budget} chooses the model, and so does preset {self.preset}; leave one of them out"
            )
        budget_s = None if self.budget is None else parse_duration(self.budget)
        config = RunConfig(self.model, self.train, self.optimizer, self.schedule, self.parallel)
        if self.dry_run:
            dry_run(config)
            return 0
        names = [name for words in self.tasks for name in words.split(",") if name]
        if names and not self.task_data:
            raise UserError("tasks need their files; name the folder that holds them with --task-data")
        benchmark = TasksDuringTraining.read(names, self.task_data, self.task_items) if names else None
        console = Console(soft_wrap=True, quiet=not is_first_process())
        with joined(config) as (config, parallelize):
            if budget_s is not None and parallelize is not None:
                raise UserError(f"budget {self.budget} plans for one process; leave it out, or start one process")
            done = train_on_text(
                self.data,
                config,
                text=self.text,
                budget_s=budget_s,
                started=started,
                console=console,
                parallelize=parallelize,
                benchmark=benchmark,
            )
        if done.result.stop_signal is not None:
            console.print(f"The checkpoint is {done.result.checkpoint}; the same command goes on from there.")
            return 128 + done.result.stop_signal
        if is_first_process():
            show(done)
        return 0


def dry_run(config: RunConfig) -> None:
    """Print what a run would be, without touching data or device memory."""
    device = choose_device(config.train.device)
    for section, values in config.to_dict().items():
        print(f"[{section}]")
        for name, value in values.items():
            print(f"{name} = {value!r}")
    micro_batch_size = config.train.micro_batch_size or config.train.global_batch_size
    # A budget is met by measuring blocks, which is more than a dry run does: the least it can come to is shown.
    checkpointing = "blocks" if config.train.grad_checkpointing == "budget" else config.train.grad_checkpointing
    cost = estimate(
        config.model,
        seq_len=config.train.seq_len,
        micro_batch_size=micro_batch_size,
        dtype=choose_dtype(config.train.dtype, device),
        optimizer=config.optimizer,
        grad_checkpointing=checkpointing,
        grad_checkpointing_every=config.train.grad_checkpointing_every,
        num_micro_batches=config.train.global_batch_size // micro_batch_size,
        device=device.type,
    )
    parts = {
        "weights": cost.weights_bytes + cost.packed_bytes,
        "gradients": cost.gradients_bytes,
        "optimizer": cost.optimizer_bytes,
        "activations": cost.activations_bytes,
    }
    print(f"\nparameters       {cost.num_parameters:,}")
    print(f"FLOPs per token  {cost.flops_per_token:,} (forward and backward)")
    print(f"memory           {cost.peak_bytes / 1e9:.2f} GB at the peak, micro batches of {micro_batch_size}: ", end="")
    print(", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items()))


def show_samples(samples: Iterable[Sample]) -> None:
    for sample in samples:
        print(f"\n--- temperature {sample.temperature} ---")
        print(sample.prompt + sample.text)


def show(done: TextRun) -> None:
    """Print the samples, the figures and where the report is."""
    show_samples(done.samples)
    result = done.result
    print(
        f"\nHeld-out loss {result.heldout_loss:.4f} nats per token, {result.bits_per_byte:.4f} bits per byte, "
        f"after {result.tokens:,} tokens in {result.steps:,} steps; {format_duration(done.wall_s)} in all."
    )
    print(f"Checkpoint: {result.checkpoint}")
    print(f"Report:     {done.report}")
