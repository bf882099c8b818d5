"""ParallelConfig: how many processes each dimension takes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from warploom.errors import UserError
from warploom.models.config import TransformerConfig

DIMENSIONS = ("pipeline", "data", "shard", "context", "tensor")
"""From the outermost, whose processes talk least, to the innermost, whose processes should be neighbours."""


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes whose product is the number of processes that torchrun starts."""

    data: int = -1
    """Replicas: each takes its share of every batch. -1 takes the processes that the other dimensions leave."""
    shard: int = 1
    """Processes that share one copy of the weights, gradients and optimizer state, each with its share of the batch
    (fully sharded data parallelism)."""
    tensor: int = 1
    """Processes that share the heads, the feed-forward features and the vocabulary of every layer."""
    pipeline: int = 1
    """Processes that share the blocks, one after the other."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero-bubble"] = "1f1b"
    """Order of the micro batches in a pipeline. gpipe: all forward, then all backward. 1f1b: alternating, which holds
    fewer activations. interleaved: 1f1b with several stages per process, which waits less. zero-bubble: interleaved,
    with the weights' gradients put where it would wait."""
    stages_per_rank: int = 2
    """interleaved, zero-bubble: stages of each process."""
    context: int = 1
    """Processes that share each sequence; attention exchanges heads for positions (all-to-all)."""
    devices: int = 1
    """GPUs of the one process there is, over which the blocks lie one after the other, for a model that is too large
    for one and needs no more speed than one gives (plain model parallelism)."""

    check_collectives: bool = False
    """Compare every exchange between processes before it begins, and name both sides of one that does not fit, instead
    of waiting for ever. Slow: for finding errors."""

    def __post_init__(self) -> None:
        for name in DIMENSIONS:
            if getattr(self, name) < 1 and getattr(self, name) != -1:
                raise UserError(f"parallel.{name} is {getattr(self, name)}; give 1 or more, or -1 for the rest")
        rest = [name for name in DIMENSIONS if getattr(self, name) == -1]
        if len(rest) > 1:
            raise UserError(f"parallel.{rest[0]} and parallel.{rest[1]} are -1; only one can take the rest")
        for name in ("stages_per_rank", "devices"):
            if getattr(self, name) < 1:
                raise UserError(f"parallel.{name} is {getattr(self, name)}; give 1 or more")

    @property
    def sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in DIMENSIONS}

    @property
    def num_stages(self) -> int:
        """Stages of the whole pipeline."""
        return self.pipeline * (self.stages_per_rank if self.schedule in ("interleaved", "zero-bubble") else 1)

    def resolve(self, world_size: int) -> ParallelConfig:
        """Return these sizes with the -1 filled in. Raises UserError unless their product is world_size."""
        if self.devices > 1 and world_size > 1:
            raise UserError(
                f"parallel.devices {self.devices} spreads a model over the GPUs of one process, and there are "
                f"{world_size}; leave it out, or start one process"
            )
        fixed = {name: size for name, size in self.sizes.items() if size != -1}
        rest = next((name for name in DIMENSIONS if name not in fixed), None)
        product = math.prod(fixed.values())
        if rest is not None and world_size % product == 0:
            return dataclasses.replace(self, **{rest: world_size // product})  # type: ignore[arg-type]
        if rest is None and product == world_size:
            return self
        chosen = {name: size for name, size in fixed.items() if size > 1} or {"data": 1}
        text = " * ".join(f"{name} {size}" for name, size in chosen.items())
        raise UserError(
            f"parallel {text} = {product} does not {'divide' if rest else 'fill'} the {world_size} processes; "
            f"{_ways_out(chosen, world_size)}, or start {product} processes"
        )

    def check_model(self, model: TransformerConfig, seq_len: int) -> None:
        """Raise UserError if a dimension has more processes than the model has parts for it."""
        if self.tensor > model.kv_heads:
            raise UserError(
                f"parallel.tensor is {self.tensor}, and the model has {model.kv_heads} key/value heads to share; "
                f"give parallel.tensor {model.kv_heads} or less"
            )
        heads = model.kv_heads // self.tensor * (model.num_heads // model.kv_heads)
        if self.context > heads:
            raise UserError(
                f"parallel.context is {self.context}, and each process has {heads} heads to exchange; "
                f"give parallel.context {heads} or less"
            )
        if seq_len % self.context:
            raise UserError(
                f"train.seq_len is {seq_len}, not a multiple of parallel.context {self.context}; "
                f"give train.seq_len {math.ceil(seq_len / self.context) * self.context}"
            )
        layers = model.num_layers + (model.encoder_layers if model.architecture == "encoder-decoder" else 0)
        if self.devices > layers:
            raise UserError(
                f"parallel.devices is {self.devices}, and the model has {layers} blocks; "
                f"give parallel.devices {layers} or less"
            )
        if self.num_stages > layers:
            raise UserError(
                f"parallel.pipeline makes {self.num_stages} stages, and the model has {layers} blocks; "
                "give fewer stages"
            )


def _ways_out(chosen: dict[str, int], world_size: int) -> str:
    """For each dimension, the sizes that would work with the others as they are."""
    ways = []
    for name in chosen:
        others = math.prod(size for other, size in chosen.items() if other != name)
        if world_size % others == 0 and world_size // others != chosen[name]:
            ways.append(f"parallel.{name} {world_size // others}")
    if ways:
        return "give " + " or ".join(ways)
    divisors = [str(size) for size in range(1, world_size + 1) if world_size % size == 0]
    return f"give each dimension a divisor of {world_size} ({', '.join(divisors)}) so that their product is it"


def process_seed(seed: int, rank: int) -> int:
    """Return the seed of a process's dropout: masks of different rows and positions must not be alike."""
    return seed + rank * 1_000_003
