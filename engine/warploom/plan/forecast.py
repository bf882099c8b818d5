"""All layouts of a workload on some hardware: which fit, how long they take, what they cost; and if none fits, the
cheapest change after which one does."""

from __future__ import annotations

import dataclasses
import functools
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from warploom.plan.hardware import Hardware
from warploom.plan.layout import RESERVED, Layout, Memory, Workload, layouts, memory, num_parameters
from warploom.plan.timing import StepTime, flops_per_token, step_time

# Training tokens per parameter at which a given compute reaches the lowest loss (Hoffmann et al., 2022, table 3: 20).
TOKENS_PER_PARAMETER = 20
_MOST_DOUBLINGS = 12


@dataclass(frozen=True)
class Forecast:
    """One layout on some hardware."""

    workload: Workload
    hardware: Hardware
    layout: Layout
    memory: Memory
    time: StepTime

    @property
    def fits(self) -> bool:
        return self.memory.total <= (1 - RESERVED) * self.hardware.device.memory_bytes

    @property
    def total_s(self) -> float:
        return self.time.total * self.workload.steps

    @property
    def device_hours(self) -> float:
        return self.total_s * self.hardware.count / 3600

    @property
    def cost(self) -> float:
        """US dollars."""
        return self.device_hours * self.hardware.device.price

    @property
    def mfu(self) -> float:
        """Share of the devices' peak that goes into the model's own operations, causal half counted once."""
        tokens = self.workload.seq_len * self.workload.global_batch_size
        done = flops_per_token(self.workload).causal * tokens
        peak = self.hardware.device.flops["fp32" if self.workload.dtype.itemsize == 4 else "bf16"]
        return done / (self.time.total * self.hardware.count * peak)


def forecast(workload: Workload, layout: Layout, hardware: Hardware) -> Forecast:
    kind = "cpu" if hardware.device.name == "here" else "cuda"
    return Forecast(workload, hardware, layout, memory(workload, layout, kind), step_time(workload, layout, hardware))


def fastest(
    workload: Workload, hardware: Hardware, most: int = 5, candidates: Iterable[Layout] | None = None
) -> list[Forecast]:
    """Return the layouts that fit, the fastest first, at most one per product of dimensions."""
    found: list[Forecast] = []
    seen: set[tuple[int, ...]] = set()
    options = list(layouts(workload, hardware) if candidates is None else candidates)
    # Time is cheap to reckon and memory is not: so from the fastest on, until enough fit.
    room = (1 - RESERVED) * hardware.device.memory_bytes
    # Weights, gradients and moments are there together in each update.
    least_bytes = (16 if workload.optimizer.name == "adamw" else 12) * num_parameters(workload.model)
    timed = [(step_time(workload, layout, hardware).total, index) for index, layout in enumerate(options)]
    heapq.heapify(timed)

    @functools.cache
    def fitting(layout: Layout) -> Forecast | None:
        micro = layout.micro_batch_size
        # Half the rows take no more, and fewer sizes are traced from below. Of one micro batch the gradients are not
        # all there at the peak, so of that two halves say nothing.
        if micro > 1 and micro % 2 == 0 and layout.micro_batches(workload.global_batch_size) > 1:
            if fitting(dataclasses.replace(layout, micro_batch_size=micro // 2)) is None:
                return None
        one = forecast(workload, layout, hardware)
        return one if one.fits else None

    while timed and len(found) < most:
        layout = options[heapq.heappop(timed)[1]]
        product = (layout.data, layout.shard, layout.tensor, layout.pipeline, layout.context)
        if product in seen or least_bytes / (layout.shard * layout.tensor * layout.pipeline) > room:
            continue
        one = fitting(layout)
        if one is not None:
            found.append(one)
            seen.add(product)
    return found


@dataclass(frozen=True)
class Change:
    """A change after which a workload fits."""

    what: str
    forecast: Forecast


def cheapest_change(workload: Workload, layout: Layout, hardware: Hardware) -> Change | None:
    """Return the change of layout that makes it fit at the lowest cost of the run; None if it fits, or nothing helps.

    Tried are a smaller micro batch, recomputation, the optimizer on the host, all three together, every other layout
    of the same devices, and, if none of these fits, twice the devices, and so on.
    """
    if forecast(workload, layout, hardware).fits:
        return None
    found = [
        Change(what, one) for what, changed in _changes(layout) if (one := forecast(workload, changed, hardware)).fits
    ]
    found += [Change(f"the layout {one.layout}", one) for one in fastest(workload, hardware, 1)]
    more = hardware
    while not found and more.count < hardware.count << _MOST_DOUBLINGS:
        more = Hardware(hardware.device, 2 * more.count)
        if workload.global_batch_size >= more.count:
            found += [Change(f"{more.count} devices, as {one.layout}", one) for one in fastest(workload, more, 1)]
    return min(found, key=lambda change: change.forecast.cost, default=None)


def _changes(layout: Layout) -> Iterator[tuple[str, Layout]]:
    micro = layout.micro_batch_size
    sizes = [size for size in range(micro, 0, -1) if micro % size == 0]
    for size in sizes:
        for recompute in dict.fromkeys((layout.recompute, "ops", "blocks")):
            for offload in sorted({layout.offload, True}):
                changed = dataclasses.replace(layout, micro_batch_size=size, recompute=recompute, offload=offload)
                parts = []
                if size != micro:
                    parts.append(f"train.micro_batch_size {size}")
                if recompute != layout.recompute:
                    parts.append(f"train.grad_checkpointing {recompute}")
                if offload != layout.offload:
                    parts.append("optimizer.offload")
                if parts:
                    yield " and ".join(parts), changed
