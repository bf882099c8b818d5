"""warploom.optim.AdamW against torch's fused AdamW, on the parameters of real models.

    python -m bench.optim [--config small gpt2] [--json FILE]

Once the step alone, once after clipping the gradients to norm 1: torch by clip_grad_norm_, which writes them,
warploom by ops.grad_norm and a factor in the step. Before anything is timed both must come to the same parameters, or
the bench ends with exit code 1. share is the time of copying as many bytes as the step must read and write (28 for each
parameter, 4 more for the norm), at the rate measured in the same rounds, over the time taken: above 1 where reading is
cheaper than the writing that half of a copy is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import nn

from bench.harness import copy_ceiling, interleave, print_fingerprint, print_table, write_records
from warploom.models.presets import preset
from warploom.models.transformer import Transformer
from warploom.ops import REGISTRY, grad_norm
from warploom.optim import AdamW

MAX_NORM = 1.0


def build(shapes: list[torch.Size], kind: type[torch.optim.AdamW], **options: Any) -> tuple[Any, list[nn.Parameter]]:
    """An optimizer over parameters of these shapes, with gradients; the same numbers at each call."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return kind(parameters, lr=3e-4, **options), parameters


def subjects(shapes: list[torch.Size], clip: bool) -> tuple[dict[str, Callable[[], object]], Callable[[], float]]:
    """A step of each, and the largest difference between their parameters."""
    ours, our_parameters = build(shapes, AdamW)
    theirs, their_parameters = build(shapes, torch.optim.AdamW, fused=True)

    def warploom() -> None:
        factor = 1.0
        if clip:
            norm = grad_norm([p.grad for p in our_parameters if p.grad is not None]).item()
            factor = min(1.0, MAX_NORM / (norm + 1e-6))
        ours.step(grad_factor=factor)

    def of_torch() -> None:
        if clip:
            nn.utils.clip_grad_norm_(their_parameters, MAX_NORM)
        theirs.step()

    def difference() -> float:
        pairs = zip(our_parameters, their_parameters, strict=True)
        return max((a - b).abs().max().item() for a, b in pairs)

    return {"warploom": warploom, "torch": of_torch}, difference


def bench(config: str, clip: bool, budget_s: float) -> list[dict[str, Any]]:
    with torch.device("meta"):
        shapes = [p.shape for p in Transformer(preset(config)).parameters()]
    num_parameters = sum(shape.numel() for shape in shapes)
    calls, difference = subjects(shapes, clip)
    for _ in range(3):
        for call in calls.values():
            call()
    # A step is up to lr, and either side rounds the parameter itself, some units, by 2**-24 of it.
    if not difference() <= 2e-6:
        sys.exit(f"{config} is wrong, so nothing is timed: the parameters differ by {difference():.2g}")
    copy = copy_ceiling()
    timings = interleave({**calls, "copy": copy.call}, budget_s=budget_s)
    unavoidable_s = num_parameters * (32 if clip else 28) / copy.rate(timings["copy"])
    return [
        {
            "bench": "optim",
            "config": config,
            "parameters": num_parameters,
            "tensors": len(shapes),
            "clip": clip,
            "subject": subject,
            "back_end": REGISTRY["adamw"].choice("cpu") if subject == "warploom" else None,
            "ms": timings[subject].median_s * 1e3,
            "min_ms": timings[subject].min_s * 1e3,
            "spread": timings[subject].spread,
            "ratio": timings["torch"].median_s / timings[subject].median_s,
            "share_of_ceiling": unavoidable_s / timings[subject].median_s,
            "copy_gb_per_s": copy.rate(timings["copy"]) / 1e9,
        }
        for subject in calls
    ]


@dataclass(frozen=True)
class Arguments:
    """Time AdamW, alone and with gradient clipping, against plain torch."""

    config: tuple[Literal["tiny", "small", "gpt2"], ...] = ("small", "gpt2")
    """The models whose parameters are stepped."""
    budget_s: float = 5.0
    """Seconds of timing per table row and subject pair; at least five rounds are made."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    json: Path | None = None
    """Write the records there as JSON."""


def main(arguments: Arguments) -> None:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print_fingerprint()
    records = []
    for config in arguments.config:
        for clip in (False, True):
            records += bench(config, clip, arguments.budget_s)
    print_table(
        "AdamW (ratio: torch's time over this one's; share: of the copy rate measured in this run)",
        ("model", "parameters", "tensors", "work", "subject", "ms", "spread", "ratio", "share"),
        [
            (
                record["config"],
                f"{record['parameters'] / 1e6:.1f} M",
                str(record["tensors"]),
                "clip + step" if record["clip"] else "step",
                record["subject"] + (f" ({record['back_end']})" if record["back_end"] else ""),
                f"{record['ms']:.3f}",
                f"{record['spread']:.0%}",
                f"{record['ratio']:.2f}x",
                f"{record['share_of_ceiling']:.2f}",
            )
            for record in records
        ],
    )
    write_records(arguments.json, records)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
