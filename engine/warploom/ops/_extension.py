"""Loads warploom._C, whose registrations fill torch.ops.warploom_cpu, and knows why it is absent when it is.

What the build recorded (_build.json, written by setup.py) and what the processor has are told apart here for `doctor`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from warploom.errors import UserError


class LevelUnavailable(UserError, ValueError):
    """WARPLOOM_CPU_LEVEL names an instruction-set level that is unknown or that this processor does not have."""


def build_record() -> dict[str, Any]:
    """What setup.py recorded: built, reason, levels, left_out, compiler, torch. Empty if it never ran here."""
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
    resolved: Callable[..., Any] | None = None

    def call(*args: Any) -> Any:
        nonlocal resolved
        if resolved is None:
            level()
            resolved = getattr(torch.ops.warploom_cpu, name).default
        return resolved(*args)

    call.__name__ = name
    return call
