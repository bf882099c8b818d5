"""Rotary position embedding and its gradient, which is the turn the other way. Launchers take the arguments of the
operators warploom::rotary_fwd and _bwd."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from warploom_kernels._launch import INTERPRETER, Config, architecture, launch


@triton.jit
def rotary_kernel(
    x,  # (B, H, T, D) by its strides
    y,  # (B, T, H, D), dense
    positions,  # (T,) or (B, T) by its strides
    frequencies,  # (half,) float32
    stride_xb,
    stride_xh,
    stride_xt,
    stride_xd,
    stride_pb,
    stride_pt,
    H,
    T,
    D,
    half,
    direction,  # 1 or -1
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,  # holds half
    BLOCK_REST: tl.constexpr,  # holds the features that are not turned; 0: there are none
):
    # One token a program: its sines serve all heads.
    b, t = (tl.program_id(0) // T).to(tl.int64), (tl.program_id(0) % T).to(tl.int64)
    pair = tl.arange(0, BLOCK_HALF)
    turns = pair < half
    position = tl.load(positions + b * stride_pb + t * stride_pt).to(tl.float32)
    angle = position * tl.load(frequencies + pair, mask=turns, other=0.0)
    cos, sin = tl.cos(angle)[None, :], (direction * tl.sin(angle))[None, :]
    for first in range(0, H, BLOCK_H):
        heads = first + tl.arange(0, BLOCK_H)
        source = x + b * stride_xb + t * stride_xt + heads[:, None] * stride_xh
        target = y + (tl.program_id(0).to(tl.int64) * H + heads[:, None]) * D
        inside = (heads < H)[:, None] & turns[None, :]
        left = tl.load(source + pair[None, :] * stride_xd, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(source + (half + pair[None, :]) * stride_xd, mask=inside, other=0.0).to(tl.float32)
        tl.store(target + pair[None, :], (left * cos - right * sin).to(y.dtype.element_ty), mask=inside)
        tl.store(target + half + pair[None, :], (right * cos + left * sin).to(y.dtype.element_ty), mask=inside)
        if BLOCK_REST:
            rest = 2 * half + tl.arange(0, BLOCK_REST)
            inside = (heads < H)[:, None] & (rest < D)[None, :]
            passed = tl.load(source + rest[None, :] * stride_xd, mask=inside)
            tl.store(target + rest[None, :], passed, mask=inside)


# Launchers.


@functools.cache
def _frequencies(base: float, rotary_dim: int, device: torch.device) -> Tensor:
    """As the reference makes them: an exponential in the kernel would lose digits that a far position multiplies."""
    index = torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float32)
    return base ** (-index / rotary_dim)


def _turn(x: Tensor, positions: Tensor, base: float, rotary_dim: int, direction: int) -> Tensor:
    B, H, T, D = x.shape
    y = x.new_empty((B, T, H, D)).transpose(1, 2)
    if x.numel() == 0:
        return y
    block = 2 if architecture(x.device) == INTERPRETER else 8
    rest = D - rotary_dim
    launch(
        rotary_kernel,
        lambda _: (B * T,),
        {
            "x": x,
            "y": y,
            "positions": positions,
            "frequencies": _frequencies(base, rotary_dim, x.device),
            **{f"stride_x{axis}": x.stride(i) for i, axis in enumerate("bhtd")},
            "stride_pb": positions.stride(0) if positions.dim() == 2 else 0,
            "stride_pt": positions.stride(-1),
            "H": H,
            "T": T,
            "D": D,
            "half": rotary_dim // 2,
            "direction": direction,
        },
        [
            Config(
                {
                    "BLOCK_H": min(block, triton.next_power_of_2(H)),
                    "BLOCK_HALF": triton.next_power_of_2(max(1, rotary_dim // 2)),
                    "BLOCK_REST": triton.next_power_of_2(rest) if rest else 0,
                },
                num_warps=2,
            )
        ],
    )
    return y


def launch_rotary_fwd(x: Tensor, positions: Tensor, base: float, rotary_dim: int) -> Tensor:
    return _turn(x, positions, base, rotary_dim, 1)


def launch_rotary_bwd(dy: Tensor, positions: Tensor, base: float, rotary_dim: int) -> Tensor:
    return _turn(dy, positions, base, rotary_dim, -1)
