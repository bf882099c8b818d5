"""This machine, measured: the time of a training step from steps of models one and two blocks deep.

Blocks of a stack are alike, so each adds the same to the passes and to the update; what is left is the embedding, the
loss and everything else that comes once. A table of processors would be wrong about most of them.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from warploom.models.config import TransformerConfig
from warploom.models.recompute import keep
from warploom.models.transformer import Transformer
from warploom.nn.linear import keep_packed
from warploom.optim import build_optimizers
from warploom.plan.hardware import Device
from warploom.plan.layout import Layout, Workload
from warploom.train import matmul_rate
from warploom.train.allocator import keep_freed_memory
from warploom.train.batch_size import available_bytes
from warploom.train.estimate import KEPT
from warploom.train.step import training_step

_ROUNDS = 4


@dataclass(frozen=True)
class MeasuredTime:
    """Seconds of one training step here."""

    passes: float  # forward and backward, of all micro batches
    update: float

    @property
    def total(self) -> float:
        return self.passes + self.update


def this_device(device: torch.device, dtype: torch.dtype) -> Device:
    """Return this machine as a Device: its matrix rate in dtype, measured in 0.3 s, and its free memory."""
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    memory_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    return Device("here", {name: matmul_rate.measure(dtype, device)}, memory_bytes, 0.0, 0.0, 0.0, 1, 0.0)


def depths(model: TransformerConfig) -> list[tuple[TransformerConfig, int]]:
    """Return the models to time: one block in each stack, and one more in each in turn, with the number of blocks that
    the second stands for, the first included."""
    if model.architecture != "encoder-decoder":
        shallow = dataclasses.replace(model, num_layers=1)
        return [(shallow, 1), (dataclasses.replace(model, num_layers=2), model.num_layers)]
    shallow = dataclasses.replace(model, num_layers=1, num_encoder_layers=1)
    return [
        (shallow, 1),
        (dataclasses.replace(shallow, num_layers=2), model.num_layers),
        (dataclasses.replace(shallow, num_encoder_layers=2), model.encoder_layers),
    ]


def extrapolate(seconds: Sequence[float], blocks: Sequence[int]) -> float:
    """Return the seconds of the whole model from those of depths(). What a second block seems to save is noise."""
    first = seconds[0]
    return first + sum(
        max(0.0, more - first) * (count - 1) for more, count in zip(seconds[1:], blocks[1:], strict=True)
    )


def training_calls(
    model: TransformerConfig, workload: Workload, layout: Layout, device: torch.device
) -> Mapping[str, Callable[[], object]]:
    """Return "passes", forward and backward of one micro batch, and "update", as the trainer makes them."""
    torch.manual_seed(0)
    built = Transformer(model).to(device)
    built.compute_dtype = workload.dtype
    keep(built, KEPT[layout.recompute])
    packed = keep_packed(built)
    optimizers = build_optimizers(built, workload.optimizer, muon_dtype=workload.dtype, packed=packed)
    tokens = torch.randint(model.vocab_size, (layout.micro_batch_size, workload.seq_len + 1)).to(device)
    batch = SimpleNamespace(tokens=tokens[:, :-1].contiguous(), targets=tokens[:, 1:].contiguous())
    if model.architecture == "encoder-decoder":
        batch.source = batch.tokens
    parameters = list(built.parameters())
    loss_sum = functools.partial(built.loss, reduction="sum")

    def passes() -> None:
        training_step(loss_sum, [batch], parameters, [], grad_clip=1.0)

    def update() -> None:
        for optimizer in optimizers:
            optimizer.step(grad_factor=0.5)

    return {"passes": passes, "update": update}


def measure(workload: Workload, layout: Layout, device: torch.device) -> MeasuredTime:
    """Time what depths() says, in turns, and return the step that follows; some seconds for small models."""
    if device.type == "cpu":
        keep_freed_memory()  # as the trainer does: it changes the time of a step
    found = depths(workload.model)
    calls = [training_calls(model, workload, layout, device) for model, _ in found]
    fastest = [{name: float("inf") for name in one} for one in calls]
    for _ in range(_ROUNDS):
        for times, one in zip(fastest, calls, strict=True):
            for name, call in one.items():
                # A busy neighbour only adds to a time.
                times[name] = min(times[name], _seconds(call, device))
    blocks = [count for _, count in found]
    passes, update = (extrapolate([times[name] for times in fastest], blocks) for name in ("passes", "update"))
    return MeasuredTime(passes * layout.micro_batches(workload.global_batch_size), update)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
