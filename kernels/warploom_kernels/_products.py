"""What the matrix-product kernels share: the order of tiles, the loop over the depth with a left operand that may be
made on the way (an activation's derivative), bit masks, activations, and tile sizes by card.

(M, K) x (K, N); every operand is read by its strides, so a transposed one is a matter of swapping two numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from warploom_kernels._launch import INTERPRETER, Config, Grid, num_multiprocessors

NONE, RELU, RELU2, GELU, GELU_TANH, SILU = (tl.constexpr(i) for i in range(6))
ACTIVATIONS = {"none": NONE, "relu": RELU, "relu2": RELU2, "gelu": GELU, "gelu_tanh": GELU_TANH, "silu": SILU}
MASK_ALIGNMENT = 16  # bytes: rows of a bit mask begin at its multiples, as cuBLASLt's auxiliary masks do


# Activations.


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def activate(h, ACTIVATION: tl.constexpr):
    if ACTIVATION == RELU:
        return tl.maximum(h, 0.0)
    elif ACTIVATION == RELU2:
        return tl.maximum(h, 0.0) * tl.maximum(h, 0.0)
    elif ACTIVATION == GELU:
        return 0.5 * h * (1.0 + tl.erf(0.7071067811865476 * h))
    elif ACTIVATION == GELU_TANH:  # (1 + tanh u) / 2 = sigmoid(2 u)
        return h * _sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    elif ACTIVATION == SILU:
        return h * _sigmoid(h)
    else:
        return h


@triton.jit
def derive(dy, saved, ACTIVATION: tl.constexpr):
    """dh, float32, from the sum before the activation. ReLU's is a matter of a bit mask."""
    if ACTIVATION == RELU2:
        return 2.0 * dy * tl.maximum(saved, 0.0)
    elif ACTIVATION == GELU:
        density = 0.3989422804014327 * tl.exp(-0.5 * saved * saved)
        return dy * (0.5 + 0.5 * tl.erf(0.7071067811865476 * saved) + saved * density)
    elif ACTIVATION == GELU_TANH:
        s = _sigmoid(1.5957691216057308 * (saved + 0.044715 * saved * saved * saved))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * saved * saved)
        return dy * (s + saved * s * (1.0 - s) * slope)
    elif ACTIVATION == SILU:
        s = _sigmoid(saved)
        return dy * (s + saved * s * (1.0 - s))
    else:
        return dy


# Bit masks: bit c % 8 of byte c // 8 says something of column c of its row.


@triton.jit
def pack_bits(bits, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(ROWS, COLS) of 0 and 1 -> (ROWS, COLS / 8) uint8."""
    worth = 1 << tl.arange(0, 8)
    eights = tl.reshape(bits.to(tl.int32), (ROWS, COLS // 8, 8))
    return tl.sum(eights * worth[None, None, :], axis=2).to(tl.uint8)


@triton.jit
def unpack_bits(packed, ROWS: tl.constexpr, COLS: tl.constexpr, AXIS: tl.constexpr):
    """Each byte as eight bits along AXIS: (ROWS, COLS) of 0 and 1."""
    place = tl.arange(0, 8)
    wide = packed.to(tl.int32)
    if AXIS == 0:
        return tl.reshape((wide[:, None, :] >> place[None, :, None]) & 1, (ROWS, COLS))
    else:
        return tl.reshape((wide[:, :, None] >> place[None, None, :]) & 1, (ROWS, COLS))


# Tiles.


@triton.jit
def place_of_tile(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Which tile of rows and of columns. GROUP tiles of rows are walked down together, so that the cache holds what
    they share."""
    first_m = tile // (GROUP * tiles_n) * GROUP
    group = tl.minimum(tiles_m - first_m, GROUP)
    return first_m + tile % (GROUP * tiles_n) % group, tile % (GROUP * tiles_n) // group


@triton.jit
def dot(a, b, acc):
    """acc + a b; float32 operands keep all their bits, which tensor cores would cut."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def add_product(
    acc,  # (BLOCK_M, BLOCK_N) float32
    sums,  # (BLOCK_M,) float32: sums of the left operand over the depth, where SUMS
    a,  # (M, K)
    saved,  # as a, in whose place derive(a, saved) is multiplied; or None
    other,  # as a: then it is derive(a * other, saved), of the gate of a product; or None
    mask,  # bits along the dense axis of a, whose elements count as 0 where theirs is 0; or None
    b,  # (K, N)
    tile_m,
    tile_n,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    mask_stride,  # bytes
    ACTIVATION: tl.constexpr,
    MASK_AXIS: tl.constexpr,  # which axis of a its bits run along
    GATED: tl.constexpr,  # then it is a * activate(saved), of the other factor
    SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of a b, added to acc."""
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    rows_a = rows.to(tl.int64)[:, None] * stride_am
    cols_b = cols.to(tl.int64)[None, :] * stride_bn
    for first in range(0, K, BLOCK_K):
        k = (first + depth).to(tl.int64)
        inside = (rows < M)[:, None] & (k < K)[None, :]
        a_tile = tl.load(a + rows_a + k[None, :] * stride_ak, mask=inside, other=0.0)
        b_tile = tl.load(b + k[:, None] * stride_bk + cols_b, mask=(k < K)[:, None] & (cols < N)[None, :], other=0.0)
        if saved is not None:
            saved_tile = tl.load(saved + rows_a + k[None, :] * stride_ak, mask=inside, other=0.0).to(tl.float32)
            da_tile = a_tile.to(tl.float32)
            if GATED:
                da_tile *= activate(saved_tile, ACTIVATION)
            else:
                if other is not None:
                    da_tile *= tl.load(other + rows_a + k[None, :] * stride_ak, mask=inside, other=0.0).to(tl.float32)
                da_tile = derive(da_tile, saved_tile, ACTIVATION)
            a_tile = da_tile.to(a_tile.dtype)
        if mask is not None:
            if MASK_AXIS == 0:
                place = tile_m * (BLOCK_M // 8) + tl.arange(0, BLOCK_M // 8)
                known = (place < mask_stride)[:, None] & (k < K)[None, :]
                packed = tl.load(mask + k[None, :] * mask_stride + place[:, None], mask=known, other=0)
            else:
                place = first // 8 + tl.arange(0, BLOCK_K // 8)
                known = (rows < M)[:, None] & (place < mask_stride)[None, :]
                packed = tl.load(mask + rows.to(tl.int64)[:, None] * mask_stride + place[None, :], mask=known, other=0)
            a_tile = tl.where(unpack_bits(packed, BLOCK_M, BLOCK_K, MASK_AXIS) != 0, a_tile, 0.0)
        if SUMS:
            sums += tl.sum(a_tile.to(tl.float32), axis=1)
        acc = dot(a_tile, b_tile, acc)
    return acc, sums


@triton.jit
def add_plain_product(
    acc, a, b, tile_m, tile_n, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc, with one tile of a b added to it: add_product without anything made on the way."""
    acc, _ = add_product(
        acc, tl.zeros((BLOCK_M,), dtype=tl.float32), a, None, None, None, b, tile_m, tile_n, M, N, K,
        stride_am, stride_ak, stride_bk, stride_bn, 0, NONE, 1, False, False, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    return acc


@triton.jit
def add_bias(acc, bias, cols, N):
    """bias: (N,), or None."""
    if bias is not None:
        acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def elements_of_tile(tile_m, tile_n, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile's rows and columns, where its elements lie in a dense (M, N) matrix, and which are inside of it."""
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    place = rows.to(tl.int64)[:, None] * N + cols[None, :]
    return rows, cols, place, (rows < M)[:, None] & (cols < N)[None, :]


# For launchers.


def persistent_grid(device: torch.device, M: int, N: int) -> Grid:
    """A program for each multiprocessor, or for each tile if these are fewer. A product without columns has tiles too:
    its rows' sums may be wanted."""
    programs = num_multiprocessors(device)
    return lambda c: (min(programs, triton.cdiv(M, c["BLOCK_M"]) * max(triton.cdiv(N, c["BLOCK_N"]), 1)),)


def tile_configs(
    arch: int,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    *,
    derived: bool = False,
    costly: bool = False,
    gated: bool = False,
) -> list[Config]:
    """For products of these operands. derived: the left one is made in registers, which takes some. costly: so does
    the epilogue, or making the operand takes an exponential; gated: and a third
    operand. None spills (tests/kernels/test_compile.py)."""
    eights = all(stride == 1 or stride % 8 == 0 for operand in (*a, *b) for stride in operand.stride())
    if arch == INTERPRETER:
        M, K = a[0].shape
        shapes = interpreted_shapes(M, b[0].shape[1], K)
    elif a[0].dtype == torch.float32:  # no tensor cores
        shapes = [(64, 64, 16, 8, 1)]
    elif not eights:  # rows that begin anywhere are read element by element
        shapes = [(64, 64, 32, 8, 2)]
    elif not 90 <= arch < 120:
        shapes = [(128, 64, 32, 8, 3), (64, 64, 32, 4, 3)] if derived else [(128, 128, 32, 8, 3), (128, 64, 32, 4, 3)]
    elif derived and costly and arch < 100:
        shapes = [(128, 64, 64, 8, 3)]
    elif derived:
        shapes = [(64, 128, 64, 8, 3)] if gated else [(128, 128, 64, 8, 3)]
    elif costly:
        shapes = [(128, 64, 64, 8, 3), (128, 64, 64, 8, 4)]
    else:
        shapes = [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4)]
    return as_configs(shapes)


def interpreted_shapes(M: int, N: int, K: int) -> list[tuple[int, int, int, int, int]]:
    """Small tiles, that small cases have several; large ones where there would be more than a hundred, as the
    interpreter takes as long for each."""
    return [(128, 128, 64, 4, 1)] if M * N * max(K, 32) > 2**22 else [(32, 32, 32, 4, 1)]


def as_configs(shapes: Sequence[tuple[int, int, int, int, int]]) -> list[Config]:
    """shapes: (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages)."""
    return [
        Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in shapes
    ]


def as_rows(tensor: Tensor) -> Tensor:
    """(..., C) -> (N, C), dense."""
    *rows, C = tensor.shape
    return tensor.contiguous().view(math.prod(rows), C)  # -1 has no answer where C is 0


def rounded(weight: Tensor, copy: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight in dtype, dense: the copy that was kept of it, if there is one."""
    return (weight.to(dtype) if copy is None else copy).contiguous()
