"""Which back end serves a call on a GPU, by measurement. Inside tuning() each kind of call is timed on every back end
that takes it, and the fastest is kept in a file per card; dispatch reads it. What is not on file goes by the table of
defaults: the order of the back ends, and what each says of being slower (ops/_op.py)."""

from __future__ import annotations

import contextlib
import functools
import importlib
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MEASURED_DEVICES = {"cuda"}
_SAMPLES = 15

_active = False


@contextlib.contextmanager
def tuning() -> Iterator[None]:
    """Inside the block, calls that are not on file for this card are measured and put there."""
    global _active
    before, _active = _active, True
    try:
        yield
    finally:
        _active = before


def is_active(device_type: str) -> bool:
    return _active and device_type in MEASURED_DEVICES


def winner(operator: str, device: torch.device, args: tuple[Any, ...]) -> str | None:
    """Name the back end that was measured as the fastest for such a call, None if none was."""
    entries = entries_of(device.index or 0)
    if not entries:
        return None
    entry = entries.get(_key(operator, _signature(args)))
    return None if entry is None else entry.get("winner")


def measure(
    operator: str, device: torch.device, args: tuple[Any, ...], calls: Mapping[str, Callable[..., Any]]
) -> None:
    """Time the call on each back end that takes it, and put what came out on file. Arguments stay as they are."""
    times_us = {name: 1e3 * _measure(functools.partial(call, *_copied(args))) for name, call in calls.items()}
    entries = entries_of(device.index or 0)
    key = _key(operator, _signature(args))
    entries[key] = {
        "winner": min(times_us, key=lambda name: times_us[name]),
        "us": {name: round(time_us, 2) for name, time_us in times_us.items()},
    }
    _files().write(file(device.index or 0), entries)


def counts(op: str, index: int = 0) -> Counter[str]:
    """How many kinds of call of an op each back end has won."""
    operators = (f"{op}_fwd", f"{op}_bwd", f"{op}_step")
    return Counter(str(entry.get("winner")) for key, entry in entries_of(index).items() if key.startswith(operators))


def file(index: int = 0) -> Path:
    """Where the choices for this card are kept. Needs a GPU."""
    return _files().tuned_file("backends", index)


@functools.cache
def entries_of(index: int) -> dict[str, dict[str, Any]]:
    """What is on file for this card, by kind of call: the winner, and each back end's microseconds."""
    return _files().read(file(index))


def _files() -> Any:
    return importlib.import_module("warploom_kernels._tuned_files")


def _signature(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_signature_of(value) for value in args)


def _signature_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.shape
    if isinstance(value, list | tuple):
        tensors = [each for each in value if isinstance(each, Tensor)]
        return len(tensors), tensors[0].dtype if tensors else None, sum(each.numel() for each in tensors)
    if isinstance(value, bool | str | torch.dtype) or value is None:
        return value
    return type(value).__name__  # of numbers, only that there is one


@functools.lru_cache(maxsize=4096)
def _key(operator: str, signature: tuple[Any, ...]) -> str:
    """Sizes up to the same powers of 2 are one kind of call."""
    return " ".join([operator, *map(_word, signature)])


def _word(part: Any) -> str:
    if isinstance(part, tuple) and isinstance(part[0], torch.dtype):
        dtype, shape = part
        return f"{_word(dtype)}[{'x'.join(str(_power_of_2(size)) for size in shape)}]"
    if isinstance(part, tuple):
        count, dtype, elements = part
        return f"{count}*{_word(dtype)}[{_power_of_2(elements)}]"
    return str(part).removeprefix("torch.")


def _power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length() if size > 0 else size


def _copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """With tensors of their own, for operators that write into what they are given."""
    return tuple(
        value.clone()
        if isinstance(value, Tensor)
        else [each.clone() if isinstance(each, Tensor) else each for each in value]
        if isinstance(value, list | tuple)
        else value
        for value in args
    )


def _measure(call: Callable[[], object]) -> float:
    """Median milliseconds, with inputs that come from memory: before each sample a block larger than the cache is
    written, during which the host also gets ahead."""
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(_SAMPLES)]
    for begin, end in events:
        flush.zero_()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)
