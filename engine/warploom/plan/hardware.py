"""Devices and links by name. Peaks are those of the makers' data sheets, dense, without sparsity; what a training step
reaches of them is `share`, one number for all (see docs/scaling.md for what it gives for published runs).

Prices change by the week and by the provider: they are for comparing layouts, and --price sets another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from warploom.errors import UserError, nearest


@dataclass(frozen=True)
class Device:
    """One accelerator or processor."""

    name: str
    flops: Mapping[str, float]  # FLOP/s of dense matrix products, by "bf16" or "fp32" (fp16 where there is no bf16)
    memory_bytes: float
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s per direction, to the devices of its node
    network: float  # bytes/s per direction and device, to other nodes
    per_node: int
    price: float  # US dollars an hour


# What large products and fused attention reach of the peak.
PRODUCT_SHARE, ATTENTION_SHARE, BANDWIDTH_SHARE = 0.7, 0.45, 0.8
LINK_SHARE = 0.7  # of the links' rate, by large messages
LINK_LATENCY_S, NETWORK_LATENCY_S = 5e-6, 2e-5  # per message of a ring

_GB = 1e9

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        # NVIDIA data sheets. V100 has no bfloat16: its float16 rate stands for it.
        Device("v100", {"bf16": 125e12, "fp32": 15.7e12}, 32 * _GB, 0.9e12, 150e9, 3.1e9, 8, 1.5),
        Device("a100-40gb", {"bf16": 312e12, "fp32": 19.5e12}, 40 * _GB, 1.56e12, 300e9, 6.25e9, 8, 1.5),
        Device("a100-80gb", {"bf16": 312e12, "fp32": 19.5e12}, 80 * _GB, 2.04e12, 300e9, 25e9, 8, 1.8),
        Device("h100", {"bf16": 989e12, "fp32": 67e12}, 80 * _GB, 3.35e12, 450e9, 50e9, 8, 3.0),
        Device("h200", {"bf16": 989e12, "fp32": 67e12}, 141 * _GB, 4.8e12, 450e9, 50e9, 8, 3.8),
        Device("b200", {"bf16": 2250e12, "fp32": 80e12}, 180 * _GB, 8.0e12, 900e9, 50e9, 8, 6.0),
        Device("rtx4090", {"bf16": 165e12, "fp32": 82.6e12}, 24 * _GB, 1.01e12, 25e9, 3.1e9, 4, 0.5),
    )
}


def device_named(name: str) -> Device:
    """Return the device called name. Raises UserError for an unknown one, with the nearest."""
    if name not in DEVICES:
        raise UserError(
            f"no device is called {name!r}{nearest(name, DEVICES)}; known are {', '.join(DEVICES)} and here"
        )
    return DEVICES[name]


@dataclass(frozen=True)
class Hardware:
    """So many devices of one kind, in nodes of device.per_node."""

    device: Device
    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"devices is {self.count}; give 1 or more")

    def ring(self, group: int, inner: int) -> tuple[float, float]:
        """Return (bytes/s, seconds of latency) per device and message of a ring over `group` devices that lie `inner`
        ranks apart: within a node if all of it fits there, else at the network's rate."""
        if group * inner <= self.device.per_node:
            return LINK_SHARE * self.device.link, LINK_LATENCY_S
        return LINK_SHARE * self.device.network, NETWORK_LATENCY_S
