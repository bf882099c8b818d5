"""Gradient checkpointing: the memory and the time of each setting, as predicted and as measured.

    python -m bench.memory [--config small gpt2] [--dtype bf16] [--budgets 0.75 0.5] [--cpu-seconds] [--json FILE]

Each setting trains the same model on one batch and must give the same loss, bit for bit, or the bench ends with exit
code 1. Memory is the most that tensors took at one time: the arena's count, in a process of its own for each setting
(torch's own count on a GPU); beside it what train/estimate.py said. Time is that of the forward and backward passes,
the settings taking turns and the fastest of each counting; added time is against keeping everything. A budget is a
share of the memory between keeping nothing and keeping all activations; train/recompute.py fits it, and predicts the
added time from the products it timed.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from bench.harness import interleave, print_fingerprint, print_table, write_records
from bench.step import CASES, DTYPES, StepCase
from warploom.errors import UserError
from warploom.models.recompute import NOTHING, PRODUCTS, Kept, keep, recomputable_blocks
from warploom.models.transformer import Transformer
from warploom.nn.linear import keep_packed
from warploom.optim import OptimizerConfig, build_optimizers
from warploom.train.allocator import keep_freed_memory
from warploom.train.device import choose_device
from warploom.train.estimate import Estimate, estimate
from warploom.train.recompute import added_s, fit, measure_stacks
from warploom.train.step import training_step

OPTIMIZER = OptimizerConfig(name="adamw")
SETTINGS: dict[str, tuple[Kept | None, int]] = {
    "none": (None, 1),
    "blocks": (NOTHING, 1),
    "every 2nd block": (NOTHING, 2),
    "ops": (PRODUCTS, 1),
}


@dataclass(frozen=True)
class _Batch:
    tokens: torch.Tensor
    targets: torch.Tensor


class Subject:
    """One model and batch, whose blocks keep now this, now that."""

    def __init__(self, case: StepCase, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        self.case, self.dtype, self.device = case, dtype, device
        self.model = Transformer(case.model).to(device)
        self.model.compute_dtype = dtype
        self.packed = keep_packed(self.model)
        tokens = torch.randint(case.model.vocab_size, (case.batch_size, case.seq_len + 1)).to(device)
        self.batch = _Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        self.loss_sum = functools.partial(self.model.loss, reduction="sum")

    def set_kept(self, kept: tuple[Kept | None, ...]) -> None:
        for block, one in zip(recomputable_blocks(self.model), kept, strict=True):
            block.kept = one

    def passes(self, kept: tuple[Kept | None, ...]) -> float:
        self.set_kept(kept)
        loss = self.loss_sum(self.batch.tokens, self.batch.targets)
        loss.backward()
        for parameter in self.model.parameters():
            parameter.grad = None
        return float(loss.detach())

    def cost(self, kept: Any) -> Estimate:
        return estimate(
            self.case.model,
            seq_len=self.case.seq_len,
            micro_batch_size=self.case.batch_size,
            dtype=self.dtype,
            optimizer=OPTIMIZER,
            kept=kept,
            num_micro_batches=1,
            device=self.device.type,
        )

    def train(self, kept: tuple[Kept | None, ...]) -> int:
        """Make two whole training steps, and return the peak of the process."""
        self.set_kept(kept)
        optimizers = build_optimizers(self.model, OPTIMIZER, muon_dtype=self.dtype, packed=self.packed)
        for _ in range(2):
            training_step(self.loss_sum, [self.batch], list(self.model.parameters()), optimizers, grad_clip=1.0)
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return torch.ops.warploom_cpu.arena_statistics()["peak_bytes"]


def peak_bytes(options: Options, config: str, kept: tuple[Kept | None, ...]) -> int:
    """The same in a process of its own."""
    choice = json.dumps([None if one is None else sorted(one) for one in kept])
    command = [sys.executable, "-m", "bench.memory", "--config", config, "--dtype", options.dtype]
    command += ["--device", options.device, "--threads", str(options.threads), "--kept", choice]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def bench(options: Options, config: str) -> list[dict[str, Any]]:
    subject = Subject(CASES[config], DTYPES[options.dtype], choose_device(options.device))
    blocks = recomputable_blocks(subject.model)
    inputs = {"tokens": subject.batch.tokens, "targets": subject.batch.targets}
    settings: dict[str, tuple[Kept | None, ...]] = {}
    for name, (kept, every) in SETTINGS.items():
        keep(subject.model, kept, every)
        settings[name] = tuple(block.kept for block in blocks)
    estimates = {name: subject.cost(kept) for name, kept in settings.items()}
    least, most = estimates["blocks"].peak_bytes, estimates["none"].peak_bytes
    for share in options.budgets:
        room = least + share * (most - least)
        found = fit(subject.model, subject.loss_sum, inputs, subject.cost, room)
        name = f"budget {room / 1e6:,.0f} MB"
        settings[name], estimates[name] = found.kept, subject.cost(found.kept)
    predicted_s = predictions(subject, settings, inputs)

    losses = {name: subject.passes(kept) for name, kept in settings.items()}
    if len(set(losses.values())) > 1:
        sys.exit(f"{config} is wrong, so nothing is timed: the losses differ, {losses}")
    calls = {name: functools.partial(subject.passes, kept) for name, kept in settings.items()}
    clock = time.process_time if options.cpu_seconds else time.perf_counter
    timings = interleave(calls, budget_s=options.seconds, device=subject.device.type, clock=clock)
    plain_s = timings["none"].min_s
    return [
        {
            "config": config,
            "dtype": options.dtype,
            "setting": name,
            "estimated_bytes": estimates[name].peak_bytes,
            "peak_bytes": peak_bytes(options, config, settings[name]),
            "passes_s": timing.min_s,
            "added": timing.min_s / plain_s - 1,
            "added_predicted": predicted_s[name] / plain_s,
            "spread": timing.spread,
        }
        for name, timing in timings.items()
    ]


def predictions(
    subject: Subject, settings: Mapping[str, tuple[Kept | None, ...]], inputs: Mapping[str, Any]
) -> dict[str, float]:
    """Seconds that each setting adds, from the times of one block's products."""
    stacks = measure_stacks(subject.model, subject.loss_sum, inputs, subject.cost)
    found = {}
    for name, kept in settings.items():
        subject.set_kept(kept)
        found[name] = added_s(stacks)
    return found


@dataclass(frozen=True)
class Options:
    """Time and measure every setting of gradient checkpointing."""

    config: tuple[str, ...] = ("small",)
    """Cases of bench.step."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    budgets: tuple[float, ...] = (0.75, 0.5, 0.25)
    """Memory budgets to fit, 0 as little as possible, 1 everything kept."""
    seconds: float = 20.0
    """Time for the rounds of one case."""
    threads: int = 0
    """0 leaves PyTorch's choice."""
    cpu_seconds: bool = False
    """Time by the processor's seconds, of all threads together, instead of the clock on the wall."""
    json: Path | None = None
    """Write the records here too."""
    kept: str = ""
    """Internal: train with this and print the peak."""


def main(options: Options) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    if not keep_freed_memory() or not hasattr(torch.ops.warploom_cpu, "arena_statistics"):
        raise UserError("memory is counted by the compiled extension's arena, which is missing: see warploom doctor")
    if options.kept:
        kept = tuple(None if one is None else frozenset(one) for one in json.loads(options.kept))
        print(Subject(CASES[options.config[0]], DTYPES[options.dtype], choose_device(options.device)).train(kept))
        return
    print_fingerprint()
    records = []
    for config in options.config:
        rows = bench(options, config)
        records += rows
        print_table(
            f"{config}, {options.dtype}, batch {CASES[config].batch_size} x {CASES[config].seq_len}",
            ("setting", "peak MB", "estimate", "passes ms", "added", "predicted", "spread"),
            [
                (
                    row["setting"],
                    f"{row['peak_bytes'] / 1e6:,.0f}",
                    f"{row['estimated_bytes'] / row['peak_bytes'] - 1:+.1%}",
                    f"{row['passes_s'] * 1e3:,.0f}",
                    f"{row['added']:+.1%}",
                    f"{row['added_predicted']:+.1%}",
                    f"{row['spread']:.1%}",
                )
                for row in rows
            ],
        )
    write_records(options.json, records)


if __name__ == "__main__":
    main(tyro.cli(Options))
