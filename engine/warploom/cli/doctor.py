"""`warploom doctor`: what was built, what this machine has, and which back end each op will use and why.

Everything shown is read from records and from the libraries' own queries; no kernel runs.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from warploom.ops import REGISTRY, Op, _cublaslt, _extension, _triton, _tuning


@dataclass(frozen=True)
class Command:
    """Show what was built, what this machine has, and which back end each op will use and why."""

    def run(self) -> None:
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 1000  # a pipe has no edge to wrap at
        for title, header, rows in (
            ("Machine", None, machine_rows()),
            ("Compiled extension", None, extension_rows()),
            ("Instruction-set levels", ("level", "state"), level_rows()),
            ("Ops", ("op", "device", "back end", "why"), op_rows()),
        ):
            console.print(_table(title, header, rows, plain=not console.is_terminal))
            console.print()


def machine_rows() -> Iterator[tuple[str, ...]]:
    yield "python", platform.python_version()
    yield "torch", f"{torch.__version__} (its own kernels use {torch.backends.cpu.get_cpu_capability()})"
    yield "triton", _version("triton")
    yield "tuned", _tuned()
    yield "threads", f"{torch.get_num_threads()} (torch.set_num_threads and OMP_NUM_THREADS change it)"
    yield "devices", ", ".join(["cpu", *_gpus()]) + ("" if _gpus() else "; no NVIDIA GPU that torch can use")


def extension_rows() -> Iterator[tuple[str, ...]]:
    record = _extension.build_record()
    yield "state", "loaded" if _extension.missing is None else _extension.missing
    yield "compiler", record.get("compiler") or "none was used"
    if record:
        cuda = record.get("cuda", {})
        archs = ", ".join(f"sm_{arch}" for arch in cuda.get("archs", ()))
        built = f"{archs}, and PTX of the last; nvcc {cuda['nvcc']}" if archs else None
        yield "CUDA kernels", built or _extension.cuda_not_built() or ""
        yield "cuBLASLt", _cublaslt.version()
    yield "built against", f"torch {record['torch']}" if record.get("torch") else "nothing"


def level_rows() -> Iterator[tuple[str, ...]]:
    record = _extension.build_record()
    loaded = _extension.missing is None
    usable = _extension.usable_levels() if loaded else []
    features = _extension.processor_features() if loaded else []
    in_use = _extension.level() if loaded else None
    for level in record.get("levels", ()):
        if level == in_use:
            state = "in use"
        elif level in usable:
            state = "built; WARPLOOM_CPU_LEVEL chooses it"
        elif loaded:
            state = "built; this processor does not have it"
        else:
            state = "built, but the extension does not load"
        yield level, state
    for level, reason in record.get("left_out", {}).items():
        yield level, f"left out, the compiler cannot: {reason}"
    yield "processor", f"has {', '.join(features) or 'none of the features asked for'}" if loaded else "not asked"


def op_rows() -> Iterator[tuple[str, ...]]:
    for name in sorted(REGISTRY):
        op = REGISTRY[name]
        for device in ("cpu", "cuda") if _gpus() else ("cpu",):
            yield (name, device, *_choice(op, device))


def _choice(op: Op, device: str) -> tuple[str, str]:
    """Name the back end; say why it is chosen and why each other one is not."""
    forced = op.forced()
    chosen = forced or op.choice(device)
    if forced:
        refusal = op.refusal(forced, device)
        why = ["demanded by WARPLOOM_BACKEND" + (f", but it cannot be used: {refusal}" if refusal else "")]
    else:
        why = ["the first in order that can be used here", *_measured(op, device)]
    if not forced and op.backends[chosen].leaves:
        why.append(f"leaves to torch, by measurement: {op.backends[chosen].leaves}")
    for name in op.backends:
        if name != chosen:
            refusal = op.refusal(name, device)
            why.append(f"not {name}: {refusal or (f'{chosen} was demanded' if forced else f'{chosen} comes first')}")
    return chosen, "; ".join(why)


def _measured(op: Op, device: str) -> list[str]:
    """Who won where calls of the op were measured on this card."""
    won = _tuning.counts(op.name) if device in _tuning.MEASURED_DEVICES else None
    if not won:
        return []
    wins = ", ".join(f"{name} {count}" for name, count in won.most_common())
    return [f"of {won.total()} kinds of call measured on this card the fastest is: {wins}"]


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]


def _tuned() -> str:
    """Where the choice of back ends, and of the Triton kernels' tile sizes, comes from."""
    if not _gpus():
        return "back ends and tiles by the tables of defaults; warploom tune measures them where there is a GPU"
    files = {"back ends": _tuning.file()} | ({"tiles": _triton.tuned_file()} if _triton.missing() is None else {})
    return "; ".join(
        f"{what} measured on this card, {path}"
        if path.exists()
        else f"{what} by the table of defaults, until warploom tune measures them"
        for what, path in files.items()
    )


def _version(package: str) -> str:
    return importlib.metadata.version(package) if importlib.util.find_spec(package) else "not installed"


def _table(title: str, header: tuple[str, ...] | None, rows: Iterator[tuple[str, ...]], *, plain: bool) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        show_header=header is not None,
        box=None if plain else box.SIMPLE_HEAD,
        pad_edge=False,
    )
    *names, last = header or ("", "")
    for name in names:
        table.add_column(name, no_wrap=True)
    table.add_column(last, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
