"""Reaches the Triton kernels of warploom_kernels without importing Triton before one of them runs."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch


def missing() -> str | None:
    """Say why no Triton kernel can run in this process, None if one can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'warploom[triton]'"
    if not torch.cuda.is_available() and not interpreting():
        return "there is no NVIDIA GPU (TRITON_INTERPRET=1 runs the kernel on the CPU, slowly)"
    return None


def tuning() -> AbstractContextManager[None]:
    """Inside the block, kernels whose shapes are not on file for this card are measured and put there."""
    return importlib.import_module("warploom_kernels._launch").tuning()


def tuned_file() -> Path:
    """Where the choices for the kernels of this card are kept. Needs a GPU."""
    return importlib.import_module("warploom_kernels._launch").tuned_file()


def interpreting() -> bool:
    """Whether Triton's interpreter is on, which runs kernels on CPU tensors."""
    return bool(importlib.import_module("triton").knobs.runtime.interpret)


def refuses_tensor(tensor: torch.Tensor) -> str | None:
    """Say why no Triton kernel takes this tensor, None if one can."""
    if tensor.dtype == torch.float64:
        return "it computes in float32, not in float64"
    if tensor.device.type == "cpu" and not interpreting():
        return "it runs on CPU tensors only under TRITON_INTERPRET=1"
    return None


def refuses_product(tensor: torch.Tensor) -> str | None:
    """Say why no Triton kernel multiplies matrices of this tensor's dtype, None if one can."""
    if tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and interpreting():
        # Seen with Triton 3.6.0, 3.7.1 and 3.9.0.
        return "Triton's interpreter multiplies the raw bits of bfloat16 in tl.dot: interpret in float32 and float16"
    return refuses_tensor(tensor)


def refuses_rows(x: torch.Tensor) -> str | None:
    """Say why the norm kernels do not take these rows, None if they do."""
    if x.shape[-1] > 65536:
        return f"its rows hold at most 65536 elements, got {x.shape[-1]}"
    return refuses_tensor(x)


def launcher(module: str, name: str) -> Callable[..., Any]:
    """Return warploom_kernels.<module>.<name>, imported at its first call."""
    resolved: Callable[..., Any] | None = None

    def call(*args: Any) -> Any:
        nonlocal resolved
        if resolved is None:
            resolved = getattr(importlib.import_module(f"warploom_kernels.{module}"), name)
        return resolved(*args)

    call.__name__ = name
    return call
