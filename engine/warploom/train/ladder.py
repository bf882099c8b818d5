"""From a naive training loop to this engine, one optimisation a rung; each rung is timed in a process of its own, and
must train the same model: its losses are those of the rung it builds on, up to rounding. Run as a program it is the
process of one rung."""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from warploom.errors import UserError
from warploom.models.presets import preset
from warploom.models.transformer import Transformer
from warploom.optim import AdamW, Muon, OptimizerConfig, build_optimizers
from warploom.train.allocator import keep_freed_memory
from warploom.train.naive import make_naive, naive_loss, naive_step
from warploom.train.step import training_step

_OPTIMIZER = OptimizerConfig(name="adamw", lr=1e-3, weight_decay=0.0)
_GRAD_CLIP = 1.0
CHECKED_STEPS = 3
# Largest difference of a loss in the first steps, nats. All rungs compute the same function, and what differs is where
# they round and in which order they sum. Up to 7e-5 was seen in float32 (AdamW enlarges it at first, when it follows
# the sign of a gradient whatever its size), 2e-3 in bfloat16, which keeps eight bits of each product.
TOLERANCE = {torch.float32: 3e-4, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Rung:
    """A way to make the training step."""

    name: str
    lesson: str
    builds_on: str | None = None
    dtype: torch.dtype = torch.float32
    naive_parts: tuple[str, ...] = ("norm", "attention", "linear")
    whole_logits: bool = True
    loop_optimizer: bool = True
    keep_memory: bool = False
    compile: bool = False
    recompute: bool = False


# Name, lesson, rung it builds on, change.
_CHANGES: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("bf16", "half the bytes, and faster products where the processor has them", "naive", {"dtype": torch.bfloat16}),
    ("norm", "one pass over memory, residual sum included", "bf16", {"naive_parts": ("attention", "linear")}),
    ("attention", "no matrix of scores, no work above the diagonal", "norm", {"naive_parts": ("linear",)}),
    ("linear", "ReLU and bias inside the product", "attention", {"naive_parts": ()}),
    ("loss", "logits a chunk at a time, gradient made with them", "linear", {"whole_logits": False}),
    ("optimizer", "one kernel for all parameters", "loss", {"loop_optimizer": False}),
    ("memory", "freed blocks are kept: no page faults", "optimizer", {"keep_memory": True}),
    ("compile", "what torch.compile adds to all that", "memory", {"compile": True}),
    ("recompute", "blocks run again in the backward pass: memory for time", "memory", {"recompute": True}),
)


def _rungs() -> Iterator[Rung]:
    rungs = {"naive": Rung("naive", "plain torch in float32, written part by part")}
    for name, lesson, builds_on, change in _CHANGES:
        rungs[name] = replace(rungs[builds_on], name=name, lesson=lesson, builds_on=builds_on, **change)
    yield from rungs.values()


RUNGS: dict[str, Rung] = {rung.name: rung for rung in _rungs()}


@dataclass(frozen=True)
class Course:
    """What every rung trains: a preset, with learned positions and biases, on one batch of (batch_size, seq_len)
    made-up tokens."""

    preset: str = "tiny"
    batch_size: int = 8
    seq_len: int = 256
    steps: int = 8
    """Steps that are timed, after one that is not."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_len


@dataclass(frozen=True)
class Outcome:
    """One rung, run."""

    losses: tuple[float, ...]
    float32_losses: tuple[float, ...]  # of the first steps of the same rung computing in float32
    first_step_s: float
    step_s: float  # the fastest of those after it
    peak_bytes: int  # above what the process held before there was a model


@dataclass(frozen=True)
class _Batch:
    tokens: Tensor
    targets: Tensor


class _LoopAdamW(torch.optim.AdamW):
    """torch's AdamW with clipping as a pass of its own, which is how torch clips."""

    def step(self, closure: None = None, *, grad_factor: float = 1.0) -> None:  # type: ignore[override]
        if grad_factor != 1.0:
            grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(grads, grad_factor)
        super().step(closure)


def build_step(rung: Rung, course: Course, dtype: torch.dtype) -> Callable[[], float]:
    """Return a function that makes one training step as the rung does and returns its loss. Every rung starts from the
    same weights."""
    torch.manual_seed(0)
    config = replace(preset(course.preset), position="learned", bias=True, max_seq_len=course.seq_len)
    model = Transformer(config)
    tokens = torch.randint(config.vocab_size, (course.batch_size, course.seq_len + 1))
    batch = _Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    make_naive(model, rung.naive_parts)
    model.compute_dtype = dtype
    model.gradient_checkpointing = rung.recompute
    parameters = list(model.parameters())
    optimizers: Sequence[_LoopAdamW | AdamW | Muon]
    if rung.loop_optimizer:
        lr, betas, eps = _OPTIMIZER.lr, _OPTIMIZER.betas, _OPTIMIZER.eps
        optimizers = [_LoopAdamW(parameters, lr, betas, eps, weight_decay=0.0, foreach=False, fused=False)]
    else:
        optimizers = build_optimizers(model, _OPTIMIZER)

    if rung.whole_logits:
        (optimizer,) = optimizers

        def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
            return naive_loss(model, tokens, targets)

        return lambda: naive_step(loss_of, batch, parameters, optimizer, grad_clip=_GRAD_CLIP)

    def loss_sum(tokens: Tensor, targets: Tensor) -> Tensor:
        return model.loss(tokens, targets, reduction="sum")

    compiled = torch.compile(loss_sum) if rung.compile else loss_sum
    return lambda: training_step(compiled, [batch], parameters, optimizers, grad_clip=_GRAD_CLIP).loss


def run_rung(rung: Rung, course: Course) -> Outcome:
    """Run a rung in this process, whose settings of malloc it may change for good."""
    if course.threads:
        torch.set_num_threads(course.threads)
    if rung.keep_memory:
        keep_freed_memory()
    before = psutil.Process().memory_info().rss
    step = build_step(rung, course, rung.dtype)
    losses, durations = [], []
    for _ in range(max(CHECKED_STEPS, 1 + course.steps)):
        started = time.perf_counter()
        losses.append(step())
        durations.append(time.perf_counter() - started)
    peak_bytes = _peak_bytes() - before
    float32_losses = losses
    if rung.dtype != torch.float32:
        step = build_step(rung, course, torch.float32)
        float32_losses = [step() for _ in range(CHECKED_STEPS)]
    return Outcome(
        losses=tuple(losses),
        float32_losses=tuple(float32_losses[:CHECKED_STEPS]),
        first_step_s=durations[0],
        step_s=min(durations[1:]),
        peak_bytes=peak_bytes,
    )


def run_in_process(rung: Rung, course: Course) -> Outcome:
    """Run a rung in a process of its own. Raises UserError if it does not come to its end."""
    request = {"rung": rung.name, "course": dataclasses.asdict(course)}
    done = subprocess.run(
        [sys.executable, "-m", "warploom.train.ladder", json.dumps(request)], capture_output=True, text=True
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        remedy = "; leave it out with --no-compile" if rung.compile else ""
        raise UserError(f"rung {rung.name} ended with code {done.returncode}: {said[0]}{remedy}")
    return Outcome(**json.loads(done.stdout.splitlines()[-1]))


@dataclass(frozen=True)
class Deviation:
    """By how much the losses of a rung differ from those of the rung it builds on, nats: the largest over its
    first steps."""

    own: float  # in the rung's dtype
    own_allowed: float
    float32: float
    float32_allowed: float

    @property
    def acceptable(self) -> bool:
        # So written that NaN is not acceptable.
        return self.own <= self.own_allowed and self.float32 <= self.float32_allowed


def deviation(rung: Rung, outcome: Outcome, below: Outcome) -> Deviation:
    """Compare a rung with the one it builds on."""
    return Deviation(
        own=_largest_difference(outcome.losses[:CHECKED_STEPS], below.losses[:CHECKED_STEPS]),
        own_allowed=TOLERANCE[rung.dtype],
        float32=_largest_difference(outcome.float32_losses, below.float32_losses),
        float32_allowed=TOLERANCE[torch.float32],
    )


def _largest_difference(a: Sequence[float], b: Sequence[float]) -> float:
    return torch.tensor(a).sub(torch.tensor(b)).abs().max().item()  # NaN if any is


def _peak_bytes() -> int:
    """The most memory that was resident in this process."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: it begins with what the parent held when this process was started.
        (line,) = (line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes, on a Mac


def main(request: str) -> None:
    values = json.loads(request)
    outcome = run_rung(RUNGS[values["rung"]], Course(**values["course"]))
    print(json.dumps(dataclasses.asdict(outcome)))


if __name__ == "__main__":
    main(sys.argv[1])
