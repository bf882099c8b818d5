"""From a naive training loop to this engine, one optimisation a rung. Each rung is a process of its own, is timed in
turns with the rung it builds on, and must train the same model: its losses are the same up to rounding. Run as a
program it is the process of one rung."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from warploom.errors import UserError
from warploom.models import recompute
from warploom.models.presets import preset
from warploom.models.transformer import Transformer
from warploom.nn.linear import keep_packed
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
    ("linear", "weights kept packed, ReLU and bias inside the product", "attention", {"naive_parts": ()}),
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
    steps: int = 8  # that are timed, after the first ones
    threads: int = 0  # 0 leaves PyTorch's choice

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_len


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
    keep_packed(model)  # as the trainer does; where linear is a naive part, there is nothing to keep
    model.compute_dtype = dtype
    recompute.keep(model, recompute.NOTHING if rung.recompute else None)
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


class RungHere:
    """A rung in this process, whose settings of malloc it may change for good."""

    def __init__(self, rung: Rung, course: Course) -> None:
        if course.threads:
            torch.set_num_threads(course.threads)
        if rung.keep_memory:
            keep_freed_memory()
        self._rung, self._course = rung, course
        self._before_bytes = psutil.Process().memory_info().rss
        self._step = build_step(rung, course, rung.dtype)

    def step(self) -> tuple[float, float]:
        """Make one step; return its loss and its seconds."""
        started = time.perf_counter()
        loss = self._step()
        return loss, time.perf_counter() - started

    def peak_bytes(self) -> int:
        """The most memory so far, above what the process held before there was a model."""
        return _peak_bytes() - self._before_bytes

    def float32_losses(self) -> list[float]:
        """The losses of the first steps of the same rung computing in float32."""
        step = build_step(self._rung, self._course, torch.float32)
        return [step() for _ in range(CHECKED_STEPS)]

    def close(self) -> None:
        pass


class RungProcess:
    """The same in a process of its own. Its methods raise UserError if that process has ended."""

    def __init__(self, rung: Rung, course: Course) -> None:
        self._rung = rung
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8")
        request = json.dumps({"rung": rung.name, "course": dataclasses.asdict(course)})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "warploom.train.ladder", request],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )

    def step(self) -> tuple[float, float]:
        loss, step_s = self._ask("step")
        return loss, step_s

    def peak_bytes(self) -> int:
        return self._ask("peak_bytes")

    def float32_losses(self) -> list[float]:
        return self._ask("float32_losses")

    def close(self) -> None:
        self._process.communicate()
        self._stderr.close()

    def _ask(self, what: str) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which the empty answer says too
            self._process.stdin.write(what + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            self._stderr.seek(0)
            said = self._stderr.read().strip().splitlines()[-1:] or ["it said nothing"]
            remedy = "; leave it out with --no-compile" if self._rung.compile else ""
            raise UserError(f"rung {self._rung.name} ended with code {code}: {said[0]}{remedy}")
        return json.loads(answer)


@dataclass(frozen=True)
class Result:
    """One rung, climbed."""

    rung: Rung
    losses: tuple[float, ...]  # of all its steps
    float32_losses: tuple[float, ...]  # of the first steps of the same rung computing in float32
    first_step_s: float
    step_s: float  # median of those that were timed
    faster: float  # times as fast as the rung it builds on, timed in turns with it
    faster_than_first: float  # the product of these, up to here
    peak_bytes: int
    off: float = 0.0  # largest difference of the first losses to those of the rung it builds on, nats
    float32_off: float = 0.0

    @property
    def is_right(self) -> bool:
        # So written that NaN is not right.
        return self.off <= TOLERANCE[self.rung.dtype] and self.float32_off <= TOLERANCE[torch.float32]


def climb(
    rungs: Sequence[Rung], course: Course, start: Callable[[Rung, Course], RungHere | RungProcess] = RungProcess
) -> Iterator[Result]:
    """Yield the result of each rung. It takes turns with the one it builds on, which waits for that in its process."""
    running: dict[str, RungHere | RungProcess] = {}
    results: dict[str, Result] = {}
    try:
        for number, rung in enumerate(rungs):
            running[rung.name] = start(rung, course)
            below = None if rung.builds_on is None else results[rung.builds_on]
            result = _climb_one(rung, course, running, below)
            results[rung.name] = result
            yield result
            needed = {later.builds_on for later in rungs[number + 1 :]}
            for name in [name for name in running if name not in needed]:
                running.pop(name).close()
    finally:
        for subject in running.values():
            subject.close()


def _climb_one(
    rung: Rung, course: Course, running: Mapping[str, RungHere | RungProcess], below: Result | None
) -> Result:
    subject = running[rung.name]
    steps = [subject.step() for _ in range(CHECKED_STEPS)]
    before_s = []
    for _ in range(course.steps):
        if below is not None:
            before_s.append(running[below.rung.name].step()[1])
        steps.append(subject.step())
    step_s = statistics.median(duration for _, duration in steps[CHECKED_STEPS:])
    faster = statistics.median(before_s) / step_s if below is not None else 1.0
    losses = tuple(loss for loss, _ in steps)
    peak_bytes = subject.peak_bytes()  # before the losses in float32 take more
    float32_losses = losses[:CHECKED_STEPS] if rung.dtype == torch.float32 else tuple(subject.float32_losses())
    return Result(
        rung=rung,
        losses=losses,
        float32_losses=float32_losses,
        first_step_s=steps[0][1],
        step_s=step_s,
        faster=faster,
        faster_than_first=faster * (1.0 if below is None else below.faster_than_first),
        peak_bytes=peak_bytes,
        off=0.0 if below is None else _difference(losses[:CHECKED_STEPS], below.losses[:CHECKED_STEPS]),
        float32_off=0.0 if below is None else _difference(float32_losses, below.float32_losses),
    )


def _difference(a: Sequence[float], b: Sequence[float]) -> float:
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
    """Be the process of one rung: each line of stdin names a method of RungHere, each line of stdout is its answer."""
    values = json.loads(request)
    subject = RungHere(RUNGS[values["rung"]], Course(**values["course"]))
    answers = {"step": subject.step, "peak_bytes": subject.peak_bytes, "float32_losses": subject.float32_losses}
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
