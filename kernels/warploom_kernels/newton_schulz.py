"""Newton-Schulz iterations towards the nearest orthogonal matrix, for a batch of matrices in each launch. Products that
are symmetric are made by half of their tiles. The launcher takes the arguments of warploom::newton_schulz_fwd."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from warploom_kernels._launch import INTERPRETER, Config, architecture, launch, power_of_2_key
from warploom_kernels._products import add_plain_product, elements_of_tile


@triton.jit
def newton_schulz_product_kernel(
    a,  # (batch, M, K), dense
    b,  # (batch, K, N), each by its strides
    addend,  # (batch, M, N), dense; or None
    y,  # (batch, M, N), dense: alpha a b + beta addend
    alpha,
    beta,
    M,
    N,
    K,
    stride_bk,
    stride_bn,
    SYMMETRIC: tl.constexpr,  # as y is then: tiles above the diagonal are copies of those below
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    if not SYMMETRIC or tile_m >= tile_n:
        matrix = tl.program_id(1).to(tl.int64)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        acc = add_plain_product(
            acc, a + matrix * M * K, b + matrix * K * N, tile_m, tile_n, M, N, K, K, 1, stride_bk, stride_bn,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        rows, cols, place, inside = elements_of_tile(tile_m, tile_n, M, N, BLOCK_M, BLOCK_N)
        place += matrix * M * N
        acc *= alpha
        if addend is not None:
            acc += beta * tl.load(addend + place, mask=inside, other=0.0).to(tl.float32)
        tile = acc.to(y.dtype.element_ty)
        tl.store(y + place, tile, mask=inside)
        if SYMMETRIC:
            if tile_m > tile_n:
                mirrored = matrix * M * N + cols.to(tl.int64)[:, None] * N + rows[None, :]
                tl.store(y + mirrored, tl.trans(tile), mask=(cols < N)[:, None] & (rows < M)[None, :])


# Launcher.


def _configs(arch: int, *operands: Tensor) -> list[Config]:
    if arch == INTERPRETER:
        shapes = [(32, 32, 4, 1)]
    elif operands[0].dtype == torch.float32:  # no tensor cores
        shapes = [(64, 16, 8, 1)]
    elif any(operand.shape[-1] % 8 or operand.shape[-2] % 8 for operand in operands):
        shapes = [(64, 32, 8, 2)]  # rows that begin anywhere are read element by element
    elif not 90 <= arch < 120:
        shapes = [(128, 32, 8, 3), (64, 32, 4, 3)]
    else:
        shapes = [(128, 64, 8, 3), (64, 64, 4, 4)]
    return [  # square, for symmetric products
        Config({"BLOCK_M": size, "BLOCK_N": size, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
        for size, k, warps, stages in shapes
    ]


def _product(
    a: Tensor, b: Tensor, alpha: float = 1.0, addend: Tensor | None = None, beta: float = 0.0, *, symmetric: bool
) -> Tensor:
    """alpha a b + beta addend of each of a batch; a and addend dense."""
    (batch, M, K), N = a.shape, b.shape[2]
    y = a.new_empty((batch, M, N))
    launch(
        newton_schulz_product_kernel,
        lambda c: (triton.cdiv(M, c["BLOCK_M"]) * triton.cdiv(N, c["BLOCK_N"]), batch),
        {
            "a": a,
            "b": b,
            "addend": addend,
            "y": y,
            "alpha": float(alpha),
            "beta": float(beta),
            "M": M,
            "N": N,
            "K": K,
            "stride_bk": b.stride(1),
            "stride_bn": b.stride(2),
            "SYMMETRIC": symmetric,
        },
        _configs(architecture(a.device), a, b),
        f"{a.dtype} {power_of_2_key(batch, M, N, K)}",
    )
    return y


def launch_newton_schulz_fwd(
    matrices: Tensor, dtype: torch.dtype, coefficients: list[float], iterations: int
) -> Tensor:
    wide = matrices.shape[-2] <= matrices.shape[-1]
    whole = matrices.reshape(-1, *matrices.shape[-2:])
    x = (whole if wide else whole.mT).float()  # (batch, short, long)
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).to(dtype).contiguous()
    a, b, c = coefficients
    for _ in range(iterations if x.numel() else 0):
        gram = _product(x, x.mT, symmetric=True)
        polynomial = _product(gram, gram, c, gram, b, symmetric=True)
        x = _product(polynomial, x, 1.0, x, a, symmetric=False)
    return (x if wide else x.mT).to(matrices.dtype).reshape(matrices.shape).contiguous()
