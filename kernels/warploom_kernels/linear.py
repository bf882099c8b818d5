"""y = activation(x weight^T + bias) and its gradients, by one matrix-product kernel, launchers below.

The kernel is persistent. The activation is made in the epilogue, out of the accumulator. In the backward pass its
derivative is taken in the prologue of both products, so that dh is never in memory, and the bias gradient is summed on
the way to the weight's. Launchers take the arguments of the operators warploom::linear_fwd and _bwd.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from warploom_kernels._launch import INTERPRETER, Config, architecture, launch, num_multiprocessors, power_of_2_key

NONE, RELU, RELU2, GELU_TANH, SILU = (tl.constexpr(i) for i in range(5))
_ACTIVATIONS = {"none": NONE, "relu": RELU, "relu2": RELU2, "gelu_tanh": GELU_TANH, "silu": SILU}


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def activate(h, ACTIVATION: tl.constexpr):
    if ACTIVATION == RELU:
        return tl.maximum(h, 0.0)
    elif ACTIVATION == RELU2:
        return tl.maximum(h, 0.0) * tl.maximum(h, 0.0)
    elif ACTIVATION == GELU_TANH:  # (1 + tanh u) / 2 = sigmoid(2 u)
        return h * _sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    elif ACTIVATION == SILU:
        return h * _sigmoid(h)
    else:
        return h


@triton.jit
def derive(dy, saved, ACTIVATION: tl.constexpr):
    """dh, float32. saved is y for RELU, h for the others."""
    if ACTIVATION == RELU:
        return tl.where(saved > 0, dy, 0.0)
    elif ACTIVATION == RELU2:
        return 2.0 * dy * tl.maximum(saved, 0.0)
    elif ACTIVATION == GELU_TANH:
        s = _sigmoid(1.5957691216057308 * (saved + 0.044715 * saved * saved * saved))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * saved * saved)
        return dy * (s + saved * s * (1.0 - s) * slope)
    elif ACTIVATION == SILU:
        s = _sigmoid(saved)
        return dy * (s + saved * s * (1.0 - s))
    else:
        return dy


@triton.jit
def linear_product_kernel(
    a,  # (M, K) by its strides
    saved,  # as a, in whose place derive(a, saved) is multiplied; or None
    b,  # (K, N) by its strides
    bias,  # (N,) or None
    y,  # (M, N), dense: activate(product + bias)
    h,  # (M, N), dense: product + bias; or None
    row_sums,  # (M,): sums of the left operand over K, by whoever owns the first columns; or None
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,  # rows of tiles that are walked down together, so that the cache holds what they share
):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        first_m = tile // (GROUP * tiles_n) * GROUP
        group = tl.minimum(tiles_m - first_m, GROUP)
        tile_m = first_m + tile % (GROUP * tiles_n) % group
        tile_n = tile % (GROUP * tiles_n) // group
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        depth = tl.arange(0, BLOCK_K)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        sums = tl.zeros((BLOCK_M,), dtype=tl.float32)
        rows_a = rows.to(tl.int64)[:, None] * stride_am
        cols_b = cols.to(tl.int64)[None, :] * stride_bn
        for first in range(0, K, BLOCK_K):
            k = (first + depth).to(tl.int64)
            inside = (rows < M)[:, None] & (k < K)[None, :]
            a_tile = tl.load(a + rows_a + k[None, :] * stride_ak, mask=inside, other=0.0)
            b_tile = tl.load(
                b + k[:, None] * stride_bk + cols_b, mask=(k < K)[:, None] & (cols < N)[None, :], other=0.0
            )
            if saved is not None:
                saved_tile = tl.load(saved + rows_a + k[None, :] * stride_ak, mask=inside, other=0.0).to(tl.float32)
                a_tile = derive(a_tile.to(tl.float32), saved_tile, ACTIVATION).to(a_tile.dtype)
            if row_sums is not None:
                sums += tl.sum(a_tile.to(tl.float32), axis=1)
            if a_tile.dtype == tl.float32:  # all bits, which tensor cores would cut
                acc = tl.dot(a_tile, b_tile, acc, input_precision="ieee")
            else:
                acc = tl.dot(a_tile, b_tile, acc)
        if bias is not None:
            acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        place = rows.to(tl.int64)[:, None] * N + cols[None, :]
        inside = (rows < M)[:, None] & (cols < N)[None, :]
        if h is not None:
            tl.store(h + place, acc.to(h.dtype.element_ty), mask=inside)
        if saved is None:
            acc = activate(acc, ACTIVATION)
        tl.store(y + place, acc.to(y.dtype.element_ty), mask=inside)
        if row_sums is not None:
            tl.store(row_sums + rows, sums.to(row_sums.dtype.element_ty), mask=(rows < M) & (tile_n == 0))


# Launchers.


def _configs(arch: int, a: Tensor, b: Tensor, activation: str, *, derived: bool) -> list[Config]:
    """derived: an operand is made in registers, which takes some. None spills (tests/kernels/test_compile.py)."""
    eights = all(stride == 1 or stride % 8 == 0 for stride in (*a.stride(), *b.stride()))
    if arch == INTERPRETER:
        shapes = [(32, 32, 32, 4, 1)]
    elif a.dtype == torch.float32:  # no tensor cores
        shapes = [(32, 32, 16, 4, 1)]
    elif not eights:  # rows that begin anywhere are read element by element
        shapes = [(64, 64, 32, 8, 2)]
    elif not 90 <= arch < 120:
        shapes = [(128, 64, 32, 8, 3), (64, 64, 32, 4, 3)] if derived else [(128, 128, 32, 8, 3), (128, 64, 32, 4, 3)]
    elif derived:
        narrow = arch < 100 and activation in ("gelu_tanh", "silu")
        shapes = [(128, 64, 64, 8, 3)] if narrow else [(128, 128, 64, 8, 3)]
    elif activation in ("none", "relu"):
        shapes = [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4)]
    else:
        shapes = [(128, 64, 64, 8, 3), (128, 64, 64, 8, 4)]
    return [
        Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in shapes
    ]


def _product(
    a: Tensor,  # (M, K)
    b: Tensor,  # (K, N)
    y: Tensor,
    activation: str,
    *,
    saved: Tensor | None = None,
    bias: Tensor | None = None,
    h: Tensor | None = None,
    row_sums: Tensor | None = None,
) -> None:
    (M, K), N = a.shape, b.shape[1]
    if not M or not N:
        return
    programs = num_multiprocessors(a.device)
    launch(
        linear_product_kernel,
        lambda c: (min(programs, triton.cdiv(M, c["BLOCK_M"]) * triton.cdiv(N, c["BLOCK_N"])),),
        {
            "a": a,
            "saved": saved,
            "b": b,
            "bias": bias,
            "y": y,
            "h": h,
            "row_sums": row_sums,
            "M": M,
            "N": N,
            "K": K,
            "stride_am": a.stride(0),
            "stride_ak": a.stride(1),
            "stride_bk": b.stride(0),
            "stride_bn": b.stride(1),
            "ACTIVATION": _ACTIVATIONS[activation].value,
        },
        _configs(architecture(a.device), a, b, activation, derived=saved is not None),
        f"{a.dtype} {activation if saved is None else 'd' + activation} {power_of_2_key(M, N, K)}",
    )


def _rows(tensor: Tensor) -> Tensor:
    """(..., C) -> (N, C), dense."""
    return tensor.contiguous().view(-1, tensor.shape[-1])


def launch_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, panels: Tensor | None, activation: str, need_h: bool
) -> tuple[Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    h = torch.empty_like(y) if need_h else None
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    _product(_rows(x), weight.to(x.dtype).mT, y, activation, bias=bias, h=h)
    return y, x.new_empty(0) if h is None else h


def launch_linear_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, panels: Tensor | None, saved: Tensor, activation: str,
    need_dx: bool, need_dweight: bool, need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx = x.new_empty(x.shape if need_dx else 0)
    dweight = weight.new_empty(weight.shape if need_dweight else 0)
    dbias = weight.new_empty(weight.shape[:1] if need_dbias else 0)
    dy_rows = _rows(dy)
    saved_rows = None if activation == "none" else _rows(saved)
    if need_dx:
        _product(dy_rows, weight.to(x.dtype), dx, activation, saved=saved_rows)
    if need_dweight:
        _product(
            dy_rows.mT,
            _rows(x),
            dweight,
            activation,
            saved=None if saved_rows is None else saved_rows.mT,
            row_sums=dbias if need_dbias else None,
        )
    return dx, dweight, dbias
