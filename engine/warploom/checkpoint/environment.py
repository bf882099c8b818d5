"""What decides, beside the checkpoint, whether a resumed run goes on bit for bit: measured, not only feared.

The order of floating-point sums depends on the number of threads, the processor's instruction set and the device.
"""

from __future__ import annotations

from typing import Any

import torch


def capture() -> dict[str, Any]:
    """Describe this process, for a checkpoint's meta: threads, instruction set, CUDA devices in use, torch version."""
    num_devices = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    return {
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "devices": [torch.cuda.get_device_name(index) for index in range(num_devices)],
        "torch": torch.__version__,
    }


def warning(saved: dict[str, Any]) -> str | None:
    """Say in one sentence in what this process differs from the saved description, None if it does not."""
    current = capture()
    differences = [
        f"{name} {saved.get(name)!r} then, {value!r} now" for name, value in current.items() if saved.get(name) != value
    ]
    if not differences:
        return None
    return f"the run goes on, but perhaps not bit for bit, since the machine differs: {', '.join(differences)}"
