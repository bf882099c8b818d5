"""How every bench times: subjects take turns in one run, the ceilings among them, and results are medians.

Two numbers of one table were taken in the same minutes on the same machine, so noise that comes from outside (another
process, a clock that drops) falls on all subjects alike. Numbers of different runs are not compared.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import warploom.ops  # noqa: F401  # loads the extension, whose level the fingerprint states

# A sample lasts at least this long: shorter calls are repeated within it, so that the clock and the loop do not count.
SAMPLE_S = 0.002


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one sample a round."""

    samples_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.samples_s)

    @property
    def min_s(self) -> float:
        return min(self.samples_s)

    @property
    def spread(self) -> float:
        """Distance of the quartiles over the median: what difference between two medians is noise."""
        if len(self.samples_s) < 2:
            return float("nan")
        low, _, high = statistics.quantiles(self.samples_s, n=4)
        return (high - low) / self.median_s


def interleave(
    subjects: Mapping[str, Callable[[], object]],
    *,
    warmup_s: float = 0.2,
    budget_s: float = 2.0,
    min_rounds: int = 5,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time every subject once a round, in an order drawn anew each round, until the budget is spent.

    A fixed order would be unfair: the subject that always runs after a large copy always finds the caches empty.
    Each subject first runs for warmup_s, at least twice: the first call compiles, allocates and fills caches. budget_s
    covers all rounds together; min_rounds are run whatever they cost. clock: time.process_time counts the seconds that
    the processor spent on this process, of all its threads together, which other work on the machine changes little.
    """
    synchronize = torch.cuda.synchronize if device == "cuda" else _no_wait
    repeats = {name: _warm_up(call, warmup_s, synchronize, clock) for name, call in subjects.items()}
    samples: dict[str, list[float]] = {name: [] for name in subjects}
    names = list(subjects)
    shuffle = random.Random(0).shuffle
    # A collection during a sample would charge one subject for all subjects' garbage.
    gc.collect()
    gc.disable()
    try:
        started = time.perf_counter()
        rounds = 0
        while rounds < min_rounds or time.perf_counter() - started < budget_s:
            shuffle(names)
            for name in names:
                samples[name].append(_time(subjects[name], repeats[name], synchronize, clock))
            rounds += 1
    finally:
        gc.enable()
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _no_wait() -> None:
    pass


def _warm_up(
    call: Callable[[], object], warmup_s: float, synchronize: Callable[[], None], clock: Callable[[], float]
) -> int:
    """Run the call for warmup_s and return how many calls fill one sample."""
    started = time.perf_counter()
    shortest = float("inf")
    calls = 0
    while calls < 2 or time.perf_counter() - started < warmup_s:
        shortest = min(shortest, _time(call, 1, synchronize, clock))
        calls += 1
    return max(1, round(SAMPLE_S / shortest))


def _time(
    call: Callable[[], object], repeats: int, synchronize: Callable[[], None], clock: Callable[[], float]
) -> float:
    synchronize()
    started = clock()
    for _ in range(repeats):
        call()
    synchronize()
    return (clock() - started) / repeats


@dataclass(frozen=True)
class Ceiling:
    """Something known to be near what the machine can do, timed as one more subject in the same rounds."""

    call: Callable[[], object]
    work: float  # FLOP or bytes of one call

    def rate(self, timing: Timing) -> float:
        """FLOP/s or bytes/s."""
        return self.work / timing.median_s


def matmul_ceiling(dtype: torch.dtype, device: str = "cpu", size: int = 1024) -> Ceiling:
    """torch.mm of two square matrices, 2 size^3 FLOP. 1024 is where the rate stops to grow on CPUs."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return Ceiling(lambda: torch.mm(a, b, out=out), 2 * size**3)


def copy_ceiling(device: str = "cpu", size_bytes: int = 1 << 28) -> Ceiling:
    """Copying one block to another, read and written bytes both counted.

    The block exceeds the caches of most processors; where the last-level cache holds it, the rate is that cache's, and
    so is that of ops on tensors of this size.
    """
    source = torch.zeros(size_bytes // 4, device=device)
    target = torch.empty_like(source).fill_(1.0)
    return Ceiling(lambda: target.copy_(source), 2 * size_bytes)


def fingerprint() -> dict[str, Any]:
    """What a number depends on besides the code."""
    level = torch.ops.warploom_cpu.level() if hasattr(torch.ops.warploom_cpu, "level") else None
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "level": level,  # instruction set that warploom's C++ kernels use; None without the extension
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_records(path: Path | None, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON list of records, each with the machine under "machine"; nothing without a path."""
    if path is None:
        return
    machine = fingerprint()
    path.write_text(
        json.dumps([{**record, "machine": machine} for record in records], indent=1) + "\n", encoding="utf-8"
    )


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows of ready-made text under the columns; all but the first are set to the right."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=160).print(table)


def print_fingerprint() -> None:
    print("  ".join(f"{name}={value}" for name, value in fingerprint().items() if value is not None))
