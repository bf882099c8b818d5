"""Loads warploom._C, whose registrations fill torch.ops.warploom_cpu, and knows why it is absent when it is."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def _load() -> str | None:
    try:
        importlib.import_module("warploom._C")
    except ImportError as error:
        record = Path(__file__).parent.parent / "_build.json"
        if record.exists():
            reason = json.loads(record.read_text(encoding="utf-8")).get("reason")
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


def cpu_kernel(name: str) -> Callable[..., Any]:
    """Return the C++ kernel torch.ops.warploom_cpu.<name>, looked up at its first call so that a missing extension
    is reported by the op that wanted it and not at import."""
    resolved: Callable[..., Any] | None = None

    def call(*args: Any) -> Any:
        nonlocal resolved
        if resolved is None:
            resolved = getattr(torch.ops.warploom_cpu, name).default
        return resolved(*args)

    call.__name__ = name
    return call
