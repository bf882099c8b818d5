"""`warploom ladder`: from a naive training loop to this engine, one optimisation a rung."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from warploom.errors import UserError
from warploom.train.ladder import CHECKED_STEPS, RUNGS, TOLERANCE, Course, Result, RungProcess, climb

_COLUMNS = ("tokens/s", "x before", "x first", "memory MB", "loss", "off by", "in float32")
_NOISE = 0.97  # a rung that is slower than this against the one before says so


@dataclass(frozen=True)
class Command:
    """Train a small model for a few steps, first by a naive loop in plain torch, then with one optimisation more at a
    time: how fast, in how much memory, and whether the losses stay equal. The exit code is 1 if they do not."""

    preset: Literal["nano", "tiny", "small", "base"] = "tiny"
    """The model, with learned positions and biases."""
    batch_size: int = 8
    """Sequences per step."""
    seq_len: int = 256
    """Tokens per sequence."""
    steps: int = 8
    """Steps that are timed on each rung, in turns with as many of the rung before; medians count."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    compile: bool = True
    """Climb the rung of torch.compile too; half a minute goes into compiling."""

    def run(self) -> int:
        for name in ("batch_size", "seq_len", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', '-')} is {getattr(self, name)}; give 1 or more")
        course = Course(self.preset, self.batch_size, self.seq_len, self.steps, self.threads)
        print(
            f"{self.preset}, {course.batch_size} x {course.seq_len} tokens a step, the same on every rung, each in a "
            "process of its own.\n"
            f"loss: of the last step. off by: its largest difference to the rung before over {CHECKED_STEPS} steps, at "
            "most\n"
            f"{TOLERANCE[torch.bfloat16]:g} for rounding in bfloat16; in float32: the same where both compute in "
            f"float32, at most {TOLERANCE[torch.float32]:g}.\n\n"
            f"{_line('rung', _COLUMNS)}"
        )
        rungs = [rung for rung in RUNGS.values() if self.compile or not rung.compile]
        above = ""
        for result in climb(rungs, course, start=RungProcess):
            print(f"{_line(result.rung.name, cells(result, course))}  {remarks(result, above)}", flush=True)
            if not result.is_right:
                print(
                    f"{result.rung.name} is wrong: its losses differ from those of {result.rung.builds_on} by "
                    f"{result.off:.2g}, and by {result.float32_off:.2g} in float32, more than rounding explains."
                )
                return 1
            above = result.rung.name
        return 0


def cells(result: Result, course: Course) -> tuple[str, ...]:
    is_first = result.rung.builds_on is None
    return (
        f"{course.tokens / result.step_s:,.0f}",
        "" if is_first else f"{result.faster:.2f}x",
        f"{result.faster_than_first:.2f}x",
        f"{result.peak_bytes / 1e6:,.0f}",
        f"{result.losses[-1]:.4f}",
        "" if is_first else f"{result.off:.1e}",
        "" if is_first else f"{result.float32_off:.1e}",
    )


def remarks(result: Result, above: str) -> str:
    """The lesson of the rung and what is special about its result; above: the name in the line before."""
    rung = result.rung
    parts = [rung.lesson]
    if rung.compile:
        parts.append(f"compiled in {result.first_step_s:.0f} s")
    if rung.builds_on and rung.builds_on != above:
        parts.append(f"before: {rung.builds_on}")
    if result.faster < _NOISE:
        parts.append("slower here")
    return "; ".join(parts)


def _line(name: str, cells: tuple[str, ...]) -> str:
    return f"{name:<10}" + "".join(f"{cell:>11}" for cell in cells)
