"""RMSNorm over the last dimension, forward and backward. A row is held in one block, so it must fit one.

Launchers take the arguments of the operators warploom::rms_norm_fwd and _bwd and return what those return.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rms_norm_fwd_kernel(
    x,  # (N, C), dense
    residual,  # (N, C) or None
    weight,  # (C,)
    y,  # (N, C)
    stream,  # (N, C): x + residual; None without a residual
    rstd,  # (N,) float32
    C,
    eps,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * C passes 2**31 for logits: 64k rows of 50k words
    cols = tl.arange(0, BLOCK_C)
    inside = cols < C
    # Lanes past C read 0 and so add nothing to the sum of squares.
    x_row = tl.load(x + row * C + cols, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        x_row += tl.load(residual + row * C + cols, mask=inside, other=0.0).to(tl.float32)
        # What is normalised is the stream as it is stored, so that the backward pass sees the same numbers.
        rounded = x_row.to(stream.dtype.element_ty)
        tl.store(stream + row * C + cols, rounded, mask=inside)
        x_row = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x_row * x_row, axis=0) / C + eps)
    weight_row = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(rstd + row, scale)  # float32: in bf16 its 8 bits would reach every gradient of the row
    tl.store(y + row * C + cols, x_row * scale * weight_row, mask=inside)


@triton.jit
def rms_norm_bwd_kernel(
    dy,  # (N, C), dense
    dstream,  # (N, C) or None
    x,  # (N, C)
    weight,  # (C,)
    rstd,  # (N,) float32
    dx,  # (N, C)
    dweight_parts,  # (programs, C) float32
    N,
    C,
    BLOCK_C: tl.constexpr,
):
    # Each program takes every num_programs-th row and sums its dweight in registers; a second pass adds the programs
    # up. No atomics, so the sum has one order and the result one value.
    cols = tl.arange(0, BLOCK_C)
    inside = cols < C
    weight_row = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for row_index in range(tl.program_id(0), N, tl.num_programs(0)):
        row = tl.cast(row_index, tl.int64)
        scale = tl.load(rstd + row)
        x_hat = tl.load(x + row * C + cols, mask=inside, other=0.0).to(tl.float32) * scale
        dy_row = tl.load(dy + row * C + cols, mask=inside, other=0.0).to(tl.float32)
        dweight += dy_row * x_hat
        dx_hat = dy_row * weight_row
        # y ignores the length of x, so the part of dx_hat along x_hat carries no gradient.
        dx_row = scale * (dx_hat - x_hat * (tl.sum(dx_hat * x_hat, axis=0) / C))
        if dstream is not None:
            dx_row += tl.load(dstream + row * C + cols, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + row * C + cols, dx_row, mask=inside)
    tl.store(dweight_parts + tl.program_id(0) * C + cols, dweight, mask=inside)


# Launchers.


def _block(C: int) -> tuple[int, int]:
    """Block width and warps for rows of C."""
    block = triton.next_power_of_2(C)
    return block, min(max(block // 512, 1), 16)


def launch_rms_norm_fwd(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    C = x.shape[-1]
    x = x.contiguous()
    y = torch.empty_like(x)
    stream = x.new_empty(0) if residual is None else torch.empty_like(x)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    block, warps = _block(C)
    if rstd.numel():
        rms_norm_fwd_kernel[(rstd.numel(),)](
            x,
            None if residual is None else residual.contiguous(),
            weight.contiguous(),
            y,
            None if residual is None else stream,
            rstd,
            C,
            eps,
            BLOCK_C=block,
            num_warps=warps,
        )
    return y, stream, rstd


def launch_rms_norm_bwd(
    dy: Tensor, dstream: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    C = x.shape[-1]
    N = rstd.numel()
    x = x.contiguous()
    dx = torch.empty_like(x)
    block, warps = _block(C)
    programs = min(N, _num_programs(x.device))
    parts = weight.new_empty((programs, C), dtype=torch.float32)
    if N:
        rms_norm_bwd_kernel[(programs,)](
            dy.contiguous(),
            None if dstream is None else dstream.contiguous(),
            x,
            weight.contiguous(),
            rstd,
            dx,
            parts,
            N,
            C,
            BLOCK_C=block,
            num_warps=warps,
        )
    return dx, parts.sum(0).to(weight.dtype)


def _num_programs(device: torch.device) -> int:
    """Two programs a multiprocessor hide each other's loads; the interpreter runs them in turn."""
    if device.type != "cuda":
        return 4
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count
