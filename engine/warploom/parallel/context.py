"""Context parallelism: each sequence over the processes of one axis.

Only attention looks beyond its own positions. There heads are exchanged for positions (Jacobs et al., 2023): a process
attends with some heads over whole sequences, by the fused op as it is, with every mask and bias it knows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from warploom.data.loader import IGNORE_INDEX
from warploom.models.transformer import Stack, Transformer
from warploom.nn.attention import CrossAttention, SelfAttention
from warploom.ops.attention import attention
from warploom.parallel.collectives import heads_to_sequence, sequence_to_heads
from warploom.parallel.mesh import Axis, split_sizes

Inputs = dict[str, Any]


def apply_context(model: Transformer, axis: Axis) -> None:
    """Let the model take the part of each sequence that take_context cuts."""
    for module in model.modules():
        if isinstance(module, SelfAttention | CrossAttention):
            module.attend = ContextAttention(axis)
        elif isinstance(module, Stack):
            module.register_forward_pre_hook(_WholeSequence(axis), with_kwargs=True)


def take_context(inputs: Inputs, axis: Axis) -> Inputs:
    """Return this process's part of the arguments of Transformer.loss: as many positions on each, padding included.

    Packed documents lie in one row end to end, and it is this row that is cut.
    """
    n, index = axis.size, axis.index
    taken = dict(inputs)
    if "cu_seqlens" in inputs:
        B, T = inputs["tokens"].shape
        for name in ("tokens", "targets", "positions"):
            taken[name] = inputs[name].reshape(-1).chunk(n)[index].view(B, T // n)
        return taken
    if "source" in inputs and inputs["source"].shape[1] % n and "source_lengths" not in inputs:
        B, S = inputs["source"].shape
        taken["source_lengths"] = torch.full((B,), S, device=inputs["source"].device)
    for name, fill in (("tokens", 0), ("targets", IGNORE_INDEX), ("positions", 0), ("source", 0)):
        if name in inputs:
            x = inputs[name]
            taken[name] = F.pad(x, (0, -x.shape[-1] % n), value=fill).chunk(n, dim=-1)[index].contiguous()
    return taken


class _WholeSequence:
    """Before a stack: give its positions and its longest document as the whole sequence has them."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        positions = kwargs["positions"]
        if positions.dim() == 1:  # 0, 1, ...: where rows differ, take_context has cut them
            positions = positions + self.axis.index * len(positions)
        return args, {**kwargs, "positions": positions, "window": kwargs["window"] * self.axis.size}


class ContextAttention:
    """ops.attention of q (B, H, t, D) and k, v (B, H_kv, s, D), the positions of this process of t n and s n."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, **arguments: Any) -> Tensor:
        H, H_kv = q.shape[1], k.shape[1]
        q_sizes = split_sizes(H, self.axis.size)
        first = sum(q_sizes[: self.axis.index])
        kv_heads = [_kv_heads(q_sizes, index, H // H_kv) for index in range(self.axis.size)]
        sent = torch.tensor([head for heads in kv_heads for head in heads], device=q.device)
        kv_sizes = [len(heads) for heads in kv_heads]
        if bias is not None and bias.shape[0] > 1:
            bias = bias[first : first + q_sizes[self.axis.index]]
        o = attention(
            heads_to_sequence(q, self.axis, q_sizes),
            heads_to_sequence(k.index_select(1, sent), self.axis, kv_sizes),
            heads_to_sequence(v.index_select(1, sent), self.axis, kv_sizes),
            bias=bias,
            **arguments,
        )
        return sequence_to_heads(o, self.axis, q_sizes)


def _kv_heads(q_sizes: list[int], index: int, group: int) -> list[int]:
    """Which key/value heads the query heads of process index read, so that they read them in equal groups."""
    first = sum(q_sizes[:index])
    last = first + q_sizes[index]
    heads = range(first // group, -(-last // group))
    if len(heads) == 1 or (first % group == 0 and last % group == 0):
        return list(heads)
    return [head // group for head in range(first, last)]
