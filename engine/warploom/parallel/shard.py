"""Replicas and shards of the weights by fully_shard (Zhao et al., 2023), and which part of each weight lies here."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from warploom.models.transformer import Stack
from warploom.parallel.mesh import Mesh, chunk_range
from warploom.parallel.tensor import Slices


@dataclass(frozen=True)
class Part:
    """A box cut out of a tensor: where it starts and how long it is, per dimension."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def of(self, whole: Tensor) -> Tensor:
        """Return a view of this part of the whole tensor."""
        for dim, (start, length) in enumerate(zip(self.start, self.shape, strict=True)):
            whole = whole.narrow(dim, start, length)
        return whole


def apply_shard(model: nn.Module, mesh: Mesh, *, reshard: bool) -> None:
    """Keep of each parameter one of as many parts as the mesh's fsdp axis has processes, gather a block's when it runs,
    and sum gradients over that axis and the replicas.

    reshard: give a block's gathered weights back after its forward pass, and gather them again for the backward pass.
    """
    # The packed hidden states are a view into their row; nothing writes into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for stack in model.modules():
        if isinstance(stack, Stack):
            for block in stack.blocks:
                if any(True for _ in block.parameters()):
                    fully_shard(block, mesh=mesh.weights, reshard_after_forward=reshard)
    # The output layer's weight is read after the model's forward pass, so what belongs to no block stays.
    fully_shard(model, mesh=mesh.weights, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the targets of the whole global batch already.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def part_at(shape: torch.Size, slices: Slices | None, tensor_index: int, fsdp: tuple[int, int]) -> Part:
    """Return the part of a whole parameter that lies on the process with these places on the two axes.

    fsdp: index and size of that axis.
    """
    start, length = [0] * len(shape), list(shape)
    if slices is not None:
        start[slices.dim], last = slices.range(tensor_index)
        length[slices.dim] = last - start[slices.dim]
    index, size = fsdp
    if size > 1:
        first, last = chunk_range(length[0], size, index)
        start[0], length[0] = start[0] + first, last - first
    return Part(tuple(start), tuple(length))
