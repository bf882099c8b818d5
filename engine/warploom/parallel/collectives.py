"""Exchanges along one axis of the mesh that have a gradient. Sizes need not divide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from warploom.parallel.mesh import Axis, split_sizes

# torch 2.13 deprecates the names before it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather_sequence(x: Tensor, axis: Axis, total: int) -> Tensor:
    """Return (B, total, C) of the parts (B, t, C) of all processes. The gradient sums what each made of the whole."""
    return _Gather.apply(x, axis, total)


def reduce_scatter_sequence(x: Tensor, axis: Axis) -> Tensor:
    """Return this process's part (B, t, C) of the sum over processes of x (B, T, C)."""
    return _ReduceScatter.apply(x, axis)


def take_sequence(x: Tensor, axis: Axis) -> Tensor:
    """Return this process's part (B, t, C) of x (B, T, C), which is the same on all. The gradient is the whole."""
    return _Take.apply(x, axis)


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """Return the sum of x over processes, whose gradient, the same on all, is that of each x."""
    return _AllReduce.apply(x, axis)


def heads_to_sequence(x: Tensor, axis: Axis, head_sizes: Sequence[int]) -> Tensor:
    """Return (B, h, n t, D), all positions of this process's h heads, of x (B, H, t, D), all heads of its positions.

    head_sizes: how many consecutive heads of x go to each of the n processes.
    """
    return _HeadsToSequence.apply(x, axis, tuple(head_sizes))


def sequence_to_heads(x: Tensor, axis: Axis, head_sizes: Sequence[int]) -> Tensor:
    """The inverse of heads_to_sequence."""
    return _SequenceToHeads.apply(x, axis, tuple(head_sizes))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, total: int) -> Tensor:
        ctx.axis = axis
        return _gather(x, axis, total)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _scatter_sum(dy, ctx.axis), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.total = axis, x.shape[1]
        return _scatter_sum(x, axis)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _gather(dy, ctx.axis, ctx.total), None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.total = axis, x.shape[1]
        return x.split(split_sizes(x.shape[1], axis.size), dim=1)[axis.index].contiguous()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _gather(dy, ctx.axis, ctx.total), None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        y = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y, group=axis.group)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class _HeadsToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, head_sizes: tuple[int, ...]) -> Tensor:
        ctx.axis, ctx.head_sizes = axis, head_sizes
        return _to_sequence(x, axis, head_sizes)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _to_heads(dy, ctx.axis, ctx.head_sizes), None, None


class _SequenceToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, head_sizes: tuple[int, ...]) -> Tensor:
        ctx.axis, ctx.head_sizes = axis, head_sizes
        return _to_heads(x, axis, head_sizes)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _to_sequence(dy, ctx.axis, ctx.head_sizes), None, None


def _gather(x: Tensor, axis: Axis, total: int) -> Tensor:
    sizes = split_sizes(total, axis.size)
    rows = _padded(x.movedim(1, 0), sizes[0])  # (t, B, C)
    out = rows.new_empty(axis.size * sizes[0], *rows.shape[1:])
    _all_gather(out, rows, group=axis.group)
    if sizes[0] != sizes[-1]:
        out = torch.cat([part[:size] for part, size in zip(out.split(sizes[0]), sizes, strict=True)])
    return out.movedim(0, 1).contiguous()


def _scatter_sum(x: Tensor, axis: Axis) -> Tensor:
    sizes = split_sizes(x.shape[1], axis.size)
    rows = x.movedim(1, 0)  # (T, B, C)
    if sizes[0] != sizes[-1]:
        rows = torch.cat([_padded(part, sizes[0]) for part in rows.split(sizes)])
    out = rows.new_empty(sizes[0], *rows.shape[1:])
    _reduce_scatter(out, rows.contiguous(), group=axis.group)
    return out[: sizes[axis.index]].movedim(0, 1).contiguous()


def _padded(rows: Tensor, size: int) -> Tensor:
    missing = size - rows.shape[0]
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing)) if missing else rows.contiguous()


def _to_sequence(x: Tensor, axis: Axis, head_sizes: tuple[int, ...]) -> Tensor:
    B, _, t, D = x.shape
    mine = head_sizes[axis.index]
    received = exchange([part.reshape(-1) for part in x.split(head_sizes, dim=1)], [B * mine * t * D] * axis.size, axis)
    return torch.cat([part.view(B, mine, t, D) for part in received], dim=2)


def _to_heads(x: Tensor, axis: Axis, head_sizes: tuple[int, ...]) -> Tensor:
    B, _, T, D = x.shape
    t = T // axis.size
    received = exchange([part.reshape(-1) for part in x.split(t, dim=2)], [B * h * t * D for h in head_sizes], axis)
    parts = [part.view(B, h, t, D) for part, h in zip(received, head_sizes, strict=True)]
    return torch.cat(parts, dim=1)


def exchange(parts: Sequence[Tensor], received_sizes: Sequence[int], axis: Axis) -> tuple[Tensor, ...]:
    """Send parts[i], flat, to process i, and return what each process sent, of the sizes that the caller knows."""
    sent = torch.cat(list(parts))
    received = sent.new_empty(sum(received_sizes))
    sent_sizes = [part.numel() for part in parts]
    dist.all_to_all_single(received, sent, list(received_sizes), sent_sizes, group=axis.group)
    return received.split(list(received_sizes))
