"""The forecast of warploom.plan for this machine against real training steps: memory and time of several models.

    python -m bench.plan [--case NAME ...] [--seconds 20] [--cpu-seconds] [--json FILE]
    python -m bench.plan --published

Forecast: memory by following the step on the meta device (train/estimate.py), time from models one and two blocks deep
(plan/here.py). Real: the most that tensors took, as the arena counted it in a process of its own, and the fastest
passes and update, timed in turns with those of the shallow models. --cpu-seconds: on one thread, in the seconds that
the processor spent, for a machine that does other work as well.

--published sets the forecast beside runs whose makers said how many device-hours they took; nothing is measured.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from bench.harness import interleave, print_fingerprint, print_table, write_records
from warploom.models.config import TransformerConfig
from warploom.models.presets import preset
from warploom.optim import OptimizerConfig
from warploom.plan.here import depths, extrapolate, training_calls
from warploom.plan.layout import Layout, Workload, memory
from warploom.plan.published import RUNS, reckon
from warploom.train.allocator import keep_freed_memory

CPU = torch.device("cpu")
ADAMW, MUON = OptimizerConfig(name="adamw"), OptimizerConfig(name="muon")
_TINY = preset("tiny")
_WIDE = TransformerConfig(vocab_size=4096, max_seq_len=256, d_model=512, num_layers=4, num_heads=8)
_ENCODER_DECODER = dataclasses.replace(preset("transformer-base"), vocab_size=4096, d_model=256, d_ff=1024)


def _case(model: TransformerConfig, batch: int, seq_len: int, dtype: torch.dtype, optimizer: OptimizerConfig = ADAMW,
          recompute: str = "none") -> tuple[Workload, Layout]:  # fmt: skip
    workload = Workload(model, 1e6, seq_len, batch, dtype, optimizer)
    return workload, Layout(micro_batch_size=batch, recompute=recompute)


CASES: dict[str, tuple[Workload, Layout]] = {
    "tiny": _case(_TINY, 16, 256, torch.float32),
    "tiny bf16 muon": _case(_TINY, 16, 256, torch.bfloat16, MUON),
    "tiny blocks": _case(dataclasses.replace(_TINY, num_layers=8), 16, 256, torch.float32, recompute="blocks"),
    "small bf16": _case(preset("small"), 16, 256, torch.bfloat16),
    "wide swiglu": _case(dataclasses.replace(_WIDE, activation="swiglu", norm="rms_norm"), 8, 256, torch.float32),
    "wide gelu bf16 ops": _case(dataclasses.replace(_WIDE, activation="gelu"), 8, 256, torch.bfloat16, recompute="ops"),
    "long": _case(dataclasses.replace(_TINY, max_seq_len=1024, num_layers=6), 2, 1024, torch.bfloat16),
    "encoder-decoder": _case(dataclasses.replace(_ENCODER_DECODER, num_layers=3), 8, 128, torch.float32),
}


def bench(name: str, seconds: float, clock: Callable[[], float]) -> dict[str, Any]:
    workload, layout = CASES[name]
    found = depths(workload.model)
    calls = [training_calls(model, workload, layout, CPU) for model in (*(m for m, _ in found), workload.model)]
    timed = {f"{what} {index}": call for index, one in enumerate(calls) for what, call in one.items()}
    timings = interleave(timed, budget_s=seconds, clock=clock)
    blocks = [count for _, count in found]

    def shallow(what: str) -> float:
        return extrapolate([timings[f"{what} {index}"].min_s for index in range(len(found))], blocks)

    real_s = sum(timings[f"{what} {len(found)}"].min_s for what in ("passes", "update"))
    command = [sys.executable, "-m", "bench.plan", "--peak", name]
    peak = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return {
        "case": name,
        "peak_bytes": peak,
        "forecast_bytes": memory(workload, layout, "cpu").total,
        "step_s": real_s,
        "forecast_s": shallow("passes") + shallow("update"),
    }


def published() -> None:
    rows = []
    for run in RUNS:
        for tokens in (run.tokens, *run.other_tokens):
            found = reckon(run, tokens)
            hours = run.device_hours * tokens / run.tokens
            rows.append(
                (
                    run.name,
                    f"{tokens / 1e12:g} T",
                    f"{run.count:,} {run.device}",
                    f"{hours:,.0f}{'' if tokens == run.tokens else ' (scaled)'}",
                    f"{found.device_hours:,.0f}",
                    f"{found.device_hours / hours - 1:+.0%}",
                    f"{found.total_s / 86400:.0f}",
                    str(found.layout),
                )
            )
    print_table(
        "device-hours, published and forecast",
        ("run", "tokens", "devices", "published", "forecast", "error", "days", "layout"),
        rows,
    )
    for run in RUNS:
        print(f"{run.name}: {run.source}.")


@dataclass(frozen=True)
class Options:
    """Forecast and measure training steps."""

    case: tuple[str, ...] = tuple(CASES)
    seconds: float = 20.0
    """Time for the rounds of one case."""
    cpu_seconds: bool = False
    """Time one thread by the processor's seconds instead of the clock on the wall."""
    published: bool = False
    """Set the forecast beside published runs instead."""
    json: Path | None = None
    """Write the records here too."""
    peak: str = ""
    """Internal: train this case and print the peak of the process."""


def main(options: Options) -> None:
    keep_freed_memory()
    if options.peak:
        workload, layout = CASES[options.peak]
        calls = training_calls(workload.model, workload, layout, CPU)
        for _ in range(2):
            for call in calls.values():
                call()
        print(torch.ops.warploom_cpu.arena_statistics()["peak_bytes"])
        return
    if options.published:
        published()
        return
    if options.cpu_seconds:
        torch.set_num_threads(1)
    print_fingerprint()
    clock = time.process_time if options.cpu_seconds else time.perf_counter
    records = [bench(name, options.seconds, clock) for name in options.case]
    print_table(
        "forecast against measurement",
        ("case", "peak MB", "forecast", "error", "step ms", "forecast", "error"),
        [
            (
                record["case"],
                f"{record['peak_bytes'] / 1e6:,.0f}",
                f"{record['forecast_bytes'] / 1e6:,.0f}",
                f"{record['forecast_bytes'] / record['peak_bytes'] - 1:+.1%}",
                f"{record['step_s'] * 1e3:,.0f}",
                f"{record['forecast_s'] * 1e3:,.0f}",
                f"{record['forecast_s'] / record['step_s'] - 1:+.1%}",
            )
            for record in records
        ],
    )
    write_records(options.json, records)


if __name__ == "__main__":
    main(tyro.cli(Options))
