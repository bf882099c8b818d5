"""`warploom ladder`: from a naive training loop to this engine, one optimisation a rung."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from warploom.errors import UserError
from warploom.train.ladder import CHECKED_STEPS, RUNGS, TOLERANCE, Course, Outcome, Rung, deviation, run_in_process

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
    """Steps that are timed, after one that is not; the fastest counts."""
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
        outcomes: dict[str, Outcome] = {}
        for rung in RUNGS.values():
            if rung.compile and not self.compile:
                continue
            outcomes[rung.name] = run_in_process(rung, course)
            if not report(rung, course, outcomes):
                return 1
        return 0


def report(rung: Rung, course: Course, outcomes: dict[str, Outcome]) -> bool:
    """Print a rung's line; return whether its losses are those of the rung it builds on."""
    outcome, first = outcomes[rung.name], outcomes["naive"]
    facts = (
        f"{course.tokens / outcome.step_s:,.0f}",
        f"{first.step_s / outcome.step_s:.2f}x",
        f"{outcome.peak_bytes / 1e6:,.0f}",
        f"{outcome.losses[-1]:.4f}",
    )
    if rung.builds_on is None:
        print(f"{_line(rung.name, (facts[0], '', *facts[1:], '', ''))}  {rung.lesson}", flush=True)
        return True
    before = outcomes[rung.builds_on]
    off, faster = deviation(rung, outcome, before), before.step_s / outcome.step_s
    remarks = [rung.lesson]
    if rung.compile:
        remarks.append(f"compiled in {outcome.first_step_s:.0f} s")
    if rung.builds_on != list(outcomes)[-2]:
        remarks.append(f"before: {rung.builds_on}")
    if faster < _NOISE:
        remarks.append("slower here")
    cells = (facts[0], f"{faster:.2f}x", *facts[1:], f"{off.own:.1e}", f"{off.float32:.1e}")
    print(f"{_line(rung.name, cells)}  {'; '.join(remarks)}", flush=True)
    if not off.acceptable:
        print(
            f"{rung.name} is wrong: its losses differ from those of {rung.builds_on} by {off.own:.2g}, and by "
            f"{off.float32:.2g} in float32; rounding explains {off.own_allowed:g} and {off.float32_allowed:g}."
        )
    return off.acceptable


def _line(name: str, cells: tuple[str, ...]) -> str:
    return f"{name:<10}" + "".join(f"{cell:>11}" for cell in cells)
