"""How a model and a batch are spread over devices, and the memory that takes on each."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from warploom.errors import UserError
from warploom.models.config import TransformerConfig
from warploom.models.transformer import Transformer
from warploom.optim import OptimizerConfig
from warploom.plan.hardware import Hardware
from warploom.train.estimate import Estimate, estimate

_SHORTEST_PART = 4096  # tokens of a sequence on one device: shorter parts are faster whole
RESERVED = 0.06  # of a device's memory, for its driver, the libraries' buffers and the allocator's holes


@dataclass(frozen=True)
class Workload:
    """What is to be trained, however it is spread."""

    model: TransformerConfig
    tokens: float  # of the whole run
    seq_len: int
    global_batch_size: int  # sequences per update
    dtype: torch.dtype = torch.bfloat16
    optimizer: OptimizerConfig = OptimizerConfig(name="adamw")

    def __post_init__(self) -> None:
        for name in ("tokens", "seq_len", "global_batch_size"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}; give a number above 0")

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / (self.seq_len * self.global_batch_size))


@dataclass(frozen=True)
class Layout:
    """A product of parallel dimensions, and what one device does at a time."""

    data: int = 1
    shard: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    micro_batch_size: int = 1
    recompute: str = "none"  # a value of train.grad_checkpointing
    offload: bool = False  # optimizer state in the host's memory

    @property
    def devices(self) -> int:
        return self.replicas * self.tensor * self.pipeline * self.context

    @property
    def replicas(self) -> int:
        """Devices that see different sequences."""
        return self.data * self.shard

    def micro_batches(self, global_batch_size: int) -> int:
        return global_batch_size // (self.replicas * self.micro_batch_size)

    def __str__(self) -> str:
        names = ("data", "shard", "tensor", "pipeline", "context")
        product = " x ".join(f"{name} {getattr(self, name)}" for name in names if getattr(self, name) > 1)
        recompute = "" if self.recompute == "none" else f", recompute {self.recompute}"
        return f"{product or 'one device'}, micro batch {self.micro_batch_size}{recompute}" + (
            ", offload" if self.offload else ""
        )


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    """What lives for some operations only, at the peak: logits, flowing gradients, gathered weights."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


def memory(workload: Workload, layout: Layout, device: str = "cuda") -> Memory:
    """Reckon the memory of the fullest device. Of one device it is that of train.estimate, exactly.

    Tensor parallelism is taken to split all activations (its norms work on shards of the sequence). Fully sharded
    weights are gathered two blocks at a time, or, in a pipeline, once a step with all gradients whole until its end.
    The first stage of a pipeline holds the activations of as many micro batches as there are stages (1F1B).
    """
    if layout.devices == 1 and not layout.offload:
        return _of_one_device(_estimate(workload, layout, workload.model.num_layers, device))
    stage_layers = math.ceil(workload.model.num_layers / layout.pipeline)
    found = _estimate(workload, layout, stage_layers, device)
    split = layout.tensor * layout.shard
    table = workload.model.vocab_size * workload.model.d_model * 4
    # Of an untied model the first stage has the embedding, the last one the output layer: the estimate has both.
    unused = table if layout.pipeline > 1 and not workload.model.tie_embeddings else 0
    weights = found.weights_bytes - unused
    state = found.optimizer_bytes * (1 - unused / found.weights_bytes)
    in_flight = min(layout.pipeline, layout.micro_batches(workload.global_batch_size))
    working = _of_one_device(found).working / layout.tensor
    gradients = weights / split
    if layout.shard > 1:
        width = workload.dtype.itemsize / 4  # gathered in the compute type
        block_bytes = (weights - table) / stage_layers / layout.tensor
        if layout.pipeline > 1:
            gradients = weights / layout.tensor
            working += weights / layout.tensor * width
        else:
            working += 2 * block_bytes * width + block_bytes
    optimizer = 0.0 if layout.offload else state / split
    return Memory(weights / split, gradients, optimizer, found.activations_bytes / layout.tensor * in_flight, working)


def checkpoint_copy_bytes(workload: Workload, layout: Layout, device: str = "cuda") -> float:
    """Return the host memory that a process keeps for saving in the background: the weights and optimizer state that it
    writes, of which replicas write a share each."""
    found = _estimate(workload, layout, workload.model.num_layers, device)
    return (found.weights_bytes + found.optimizer_bytes) / layout.devices


def _of_one_device(found: Estimate) -> Memory:
    # At the peak of a single micro batch not all gradients are there yet: the rest has gone to what they wait for.
    fixed = found.weights_bytes + found.packed_bytes + found.optimizer_bytes + found.activations_bytes
    gradients = min(found.gradients_bytes, max(0, found.peak_bytes - fixed))
    activations = min(found.activations_bytes, found.peak_bytes - fixed + found.activations_bytes)
    working = found.peak_bytes - fixed - gradients if activations == found.activations_bytes else 0
    return Memory(found.weights_bytes + found.packed_bytes, gradients, found.optimizer_bytes, activations, working)


def _estimate(workload: Workload, layout: Layout, layers: int, device: str) -> Estimate:
    return _extrapolated(
        dataclasses.replace(workload.model, num_layers=layers),
        math.ceil(workload.seq_len / layout.context),
        layout.micro_batch_size,
        workload.dtype,
        workload.optimizer,
        layout.recompute,
        min(2, max(1, layout.micro_batches(workload.global_batch_size))),
        device,
    )


def _extrapolated(
    model: TransformerConfig,
    seq_len: int,
    micro_batch_size: int,
    dtype: torch.dtype,
    optimizer: OptimizerConfig,
    recompute: str,
    num_micro_batches: int,
    device: str,
) -> Estimate:
    rest = (seq_len, micro_batch_size, dtype, optimizer, recompute, num_micro_batches, device)
    if model.num_layers <= 4 or model.architecture == "encoder-decoder":
        return _traced(model, *rest)
    # Blocks are alike, so from some depth on each adds the same.
    less, more = (_traced(dataclasses.replace(model, num_layers=layers), *rest) for layers in (3, 4))
    further = model.num_layers - 4
    values = {
        field.name: round(getattr(more, field.name) + further * (getattr(more, field.name) - getattr(less, field.name)))
        for field in dataclasses.fields(Estimate)
    }
    return Estimate(**values)


@functools.lru_cache(maxsize=4096)
def _traced(
    model: TransformerConfig,
    seq_len: int,
    micro_batch_size: int,
    dtype: torch.dtype,
    optimizer: OptimizerConfig,
    recompute: str,
    num_micro_batches: int,
    device: str,
) -> Estimate:
    return estimate(
        model,
        seq_len=seq_len,
        micro_batch_size=micro_batch_size,
        dtype=dtype,
        optimizer=optimizer,
        grad_checkpointing=recompute,
        num_micro_batches=num_micro_batches,
        device=device,
    )


def layouts(workload: Workload, hardware: Hardware) -> Iterator[Layout]:
    """Yield every layout that the model's sizes allow on all of the devices.

    Tensor parallelism stays within a node. Of sharding and replicas: all sharded, within nodes only, or none.
    """
    model = workload.model
    for tensor in _divisors(hardware.device.per_node):
        if model.num_heads % tensor or (model.kv_heads % tensor and model.kv_heads > 1) or model.ff_width % tensor:
            continue
        for pipeline in _divisors(model.num_layers):
            for context in (1, 2, 4, 8, 16):
                if context > 1 and workload.seq_len / context < _SHORTEST_PART:
                    continue
                group = tensor * pipeline * context
                if hardware.count % group or workload.seq_len % context or (pipeline > 1 and _has_encoder(model)):
                    continue
                replicas = hardware.count // group
                if workload.global_batch_size % replicas:
                    continue
                per_replica = workload.global_batch_size // replicas
                for shard in sorted({1, replicas, math.gcd(replicas, hardware.device.per_node)}):
                    for micro in (size for size in (1, 2, 4, 8, 16, 32) if per_replica % size == 0):
                        if pipeline > 1 and per_replica // micro < pipeline:
                            continue  # stages would stand idle for longer than they work
                        for recompute in ("none", "ops", "blocks"):
                            yield Layout(replicas // shard, shard, tensor, pipeline, context, micro, recompute)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _has_encoder(model: TransformerConfig) -> bool:
    return model.architecture == "encoder-decoder"


@functools.lru_cache(maxsize=256)
def meta_model(model: TransformerConfig) -> Transformer:
    """Return the model on the meta device, for counting."""
    with torch.device("meta"):
        return Transformer(model)


@functools.lru_cache(maxsize=256)
def num_parameters(model: TransformerConfig) -> int:
    return meta_model(model).num_parameters()
