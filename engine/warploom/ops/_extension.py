"""Loads warploom._C, whose registrations fill torch.ops.warploom_cpu and, where the build had nvcc, warploom_cuda, and
knows why it is absent when it is.

What the build recorded (_build.json, written by setup.py) and what the processor has are told apart here for `doctor`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from warploom.errors import UserError


class LevelUnavailable(UserError, ValueError):
    """WARPLOOM_CPU_LEVEL names an instruction-set level that is unknown or that this processor does not have."""


def build_record() -> dict[str, Any]:
    """What setup.py recorded: built, reason, levels, left_out, compiler, torch, and cuda: reason, archs, nvcc, kernels
    (registers and spills of each). Empty if it never ran here."""
    path = Path(__file__).parent.parent / "_build.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _load() -> str | None:
    try:
        importlib.import_module("warploom._C")
    except ImportError as error:
        reason = build_record().get("reason")
        if reason:
            return f"the compiled extension was not built: {reason}"
        return f"the compiled extension does not load: {error}"
    return None


# Why torch.ops.warploom_cpu is empty, or None when the extension is loaded.
missing: str | None = _load()


def why_missing(*names: str) -> str | None:
    """Say why the C++ kernels of these names cannot be called, None if they can."""
    if missing is not None:
        return missing
    absent = [name for name in names if not hasattr(torch.ops.warploom_cpu, name)]
    return f"the compiled extension was built from other sources: it lacks {', '.join(absent)}" if absent else None


def why_cuda_missing(*names: str) -> str | None:
    """Say why the CUDA C++ kernels of these names cannot run in this process, None if they can."""
    reason = missing or cuda_not_built()
    if reason is not None:
        return reason
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 0):
        return f"it needs a GPU of compute capability 8.0 or higher, this one has {major}.{minor}"
    archs = build_record()["cuda"]["archs"]
    if not _runs_on(archs, major, minor):
        return (
            f"it was built for sm_{', sm_'.join(archs)}, and the GPU is an sm_{major}{minor}: install again with "
            "WARPLOOM_CUDA_ARCHS naming it"
        )
    absent = [name for name in names if not hasattr(torch.ops.warploom_cuda, name)]
    return f"the compiled extension was built from other sources: it lacks {', '.join(absent)}" if absent else None


def _runs_on(archs: Sequence[str], major: int, minor: int) -> bool:
    """Whether machine code or the PTX of the last of these architectures serves a GPU: code runs on the later minors of
    its major number, 90a on 9.0 alone, PTX on everything from it on, except 90a's."""
    for arch in archs:
        number = int(arch.rstrip("a"))
        if number // 10 == major and (number % 10 == minor if arch.endswith("a") else number % 10 <= minor):
            return True
    newest = archs[-1]
    return not newest.endswith("a") and int(newest) <= 10 * major + minor


def cuda_not_built() -> str | None:
    """Say why the extension holds no CUDA C++ kernels, None if it does."""
    cuda = build_record().get("cuda")
    if cuda is None:
        return "the compiled extension was built from other sources: it has no CUDA part"
    return f"the CUDA kernels were not built: {cuda['reason']}" if cuda["reason"] else None


def level() -> str:
    """Name the instruction-set level in use; needs the extension. Raises LevelUnavailable."""
    try:
        return torch.ops.warploom_cpu.level()
    except ValueError as error:
        raise LevelUnavailable(str(error)) from None


def usable_levels() -> list[str]:
    """The levels built in that this processor runs, lowest first; needs the extension."""
    return torch.ops.warploom_cpu.levels()


def processor_features() -> list[str]:
    """What the processor has of that which levels ask for; needs the extension."""
    return torch.ops.warploom_cpu.features()


def cpu_kernel(name: str) -> Callable[..., Any]:
    """Return the C++ kernel torch.ops.warploom_cpu.<name>, looked up at its first call so that a missing extension
    is reported by the op that wanted it and not at import."""
    return _kernel("warploom_cpu", name, level)


def cuda_kernel(name: str) -> Callable[..., Any]:
    """The same of torch.ops.warploom_cuda."""
    return _kernel("warploom_cuda", name)


def _kernel(library: str, name: str, prepare: Callable[[], Any] = lambda: None) -> Callable[..., Any]:
    resolved: Callable[..., Any] | None = None

    def call(*args: Any) -> Any:
        nonlocal resolved
        if resolved is None:
            prepare()
            resolved = getattr(getattr(torch.ops, library), name).default
        return resolved(*args)

    call.__name__ = name
    return call
