"""How a kernel is launched: with which tile sizes, warps and stages; and how a launch is looked at without a GPU.

Every kernel ships a short list of configurations for each kind of card, best guess first. `warploom tune` measures them
for the shapes that a run has and keeps the fastest in a file per card (_tuned_files.py); without an entry there the
first serves. Nothing is measured unasked: a first step is never slow, and no choice varies from run to run.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from warploom_kernels import _tuned_files

INTERPRETER = 0  # the architecture of the CPU, where Triton's interpreter runs kernels

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """Compile-time arguments of a kernel, and how it is compiled."""

    constants: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 1

    def as_record(self) -> dict[str, int]:
        return {**self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages}


Grid = Callable[[Mapping[str, int]], tuple[int, ...]]


@dataclass(frozen=True)
class Launch:
    """What one launch would compile and run: every argument that is not in a configuration, by name."""

    kernel: Any
    arguments: Mapping[str, Any]
    configs: Sequence[Config]
    key: str
    grid: Grid


@dataclass
class _Recorder:
    architecture: int
    launches: list[Launch] = field(default_factory=list)


_recorder: _Recorder | None = None
_tuning: bool = False


@contextlib.contextmanager
def recording(architecture: int) -> Iterator[list[Launch]]:
    """Inside the block launchers, given tensors of any device (meta), choose as for a card of this architecture (80 for
    sm_80), and their launches are put into the list instead of being run."""
    global _recorder
    before, _recorder = _recorder, _Recorder(architecture)
    try:
        yield _recorder.launches
    finally:
        _recorder = before


@contextlib.contextmanager
def tuning() -> Iterator[None]:
    """Inside the block, a launch that has several configurations and none on file is measured first."""
    global _tuning
    before, _tuning = _tuning, True
    try:
        yield
    finally:
        _tuning = before


def architecture(device: torch.device) -> int:
    """80 for an A100, 90 for an H100, INTERPRETER for the CPU."""
    if _recorder is not None:
        return _recorder.architecture
    return INTERPRETER if device.type == "cpu" else _capability(device.index or 0)


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def num_multiprocessors(device: torch.device) -> int:
    """How many programs run at the same time at least."""
    if device.type == "cuda":
        return _num_multiprocessors(device.index or 0)
    return 2 if _recorder is None else 132


@functools.cache
def _num_multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def launch(kernel: Any, grid: Grid, arguments: Mapping[str, Any], configs: Sequence[Config], key: str = "") -> None:
    """Run the kernel over the grid. key: what of the arguments decides which configuration is fastest."""
    if _recorder is not None:
        _recorder.launches.append(Launch(kernel, dict(arguments), tuple(configs), key, grid))
        return
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))

    def run(config: Config) -> None:
        kernel[grid(config.constants)](
            **arguments, **config.constants, num_warps=config.num_warps, num_stages=config.num_stages
        )

    if device.type != "cuda":
        return run(configs[0])
    with torch.cuda.device(device):
        if any(config.constants.get("TMA") for config in configs):
            triton.set_allocator(_descriptor_memory)
        run(configs[0] if len(configs) == 1 else _chosen(f"{kernel.__name__} {key}", configs, run, device))


def _descriptor_memory(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where a kernel puts the descriptors that it makes for the copy engine."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def power_of_2_key(*sizes: int) -> str:
    """Sizes that may share a configuration have the same key: each is rounded up to a power of 2."""
    return "x".join(str(triton.next_power_of_2(max(size, 1))) for size in sizes)


def _chosen(key: str, configs: Sequence[Config], run: Callable[[Config], None], device: torch.device) -> Config:
    entries = _entries(device.index or 0)
    on_file = entries.get(key)
    if on_file is not None:
        # An entry that no longer ships (the list has changed since) counts for nothing.
        for config in configs:
            if config.as_record() == on_file:
                return config
    if not _tuning:
        return configs[0]
    times_ms = {index: _measure(functools.partial(run, config)) for index, config in enumerate(configs)}
    best = configs[min(times_ms, key=lambda index: times_ms[index])]
    entries[key] = best.as_record()
    _tuned_files.write(tuned_file(device.index or 0), entries)
    _log.info("%s: %s of %s ms", key, entries[key], times_ms)
    return best


def _measure(run: Callable[[], None]) -> float:
    return triton.testing.do_bench(run, warmup=10, rep=30, return_mode="median")


def tuned_file(index: int = 0) -> Path:
    """Where the choices for the kernels of this card are kept."""
    return _tuned_files.tuned_file("kernels", index)


@functools.cache
def _entries(index: int) -> dict[str, dict[str, int]]:
    return _tuned_files.read(tuned_file(index))
