"""Where to compute and in which type: what the words of the configuration mean on this machine."""

from __future__ import annotations

import torch

from warploom.errors import UserError


def choose_device(name: str) -> torch.device:
    """Return the device that train.device, "auto", "cpu" or "cuda", means here. Raises UserError if it is missing."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device is 'cuda', but PyTorch finds no CUDA device here; give 'cpu' or 'auto'")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def first_devices(device: torch.device, count: int) -> list[torch.device]:
    """Return the GPUs that parallel.devices means here. Raises UserError if there are fewer, and on a CPU."""
    available = torch.cuda.device_count() if device.type == "cuda" else 1
    if count > available:
        raise UserError(
            f"parallel.devices is {count}, and this process has {available} ({device.type}); "
            f"give parallel.devices {available}" + (" or less" if available > 1 else "")
        )
    return [torch.device(device.type, index) for index in range(count)]


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the compute type that train.dtype, "auto", "bf16" or "fp32", means on the device."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
