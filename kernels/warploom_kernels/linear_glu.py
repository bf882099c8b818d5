"""y = activation(gate) * up, gate and up two products of one x, and its gradients: the gated linear units.

The forward makes both products of a tile side by side, out of one reading of x, and multiplies them in the epilogue. In
the backward pass the gradients of gate and up are made in the prologues of the products that need them; neither is ever
in memory. Launchers take the arguments of the operators warploom::linear_glu_fwd and _bwd.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from warploom_kernels._launch import (
    INTERPRETER,
    Config,
    architecture,
    launch,
    power_of_2_key,
)
from warploom_kernels._products import (
    ACTIVATIONS,
    activate,
    add_bias,
    add_product,
    as_configs,
    as_rows,
    dot,
    elements_of_tile,
    persistent_grid,
    place_of_tile,
    rounded,
)
from warploom_kernels.linear import launch_product


@triton.jit
def linear_glu_fwd_kernel(
    x,  # (M, K), dense
    gate_weight,  # (N, K), dense
    up_weight,
    gate_bias,  # (N,) or None
    up_bias,
    y,  # (M, N), dense
    gate,  # (M, N), dense: before the activation; or None
    up,
    M,
    N,
    K,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = place_of_tile(tile, tiles_m, tiles_n, GROUP)
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        depth = tl.arange(0, BLOCK_K)
        x_rows = x + rows.to(tl.int64)[:, None] * K
        weight_cols = cols.to(tl.int64)[None, :] * K
        gate_tile = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        up_tile = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for first in range(0, K, BLOCK_K):
            k = first + depth
            x_tile = tl.load(x_rows + k[None, :], mask=(rows < M)[:, None] & (k < K)[None, :], other=0.0)
            inside = (k < K)[:, None] & (cols < N)[None, :]
            gate_tile = dot(x_tile, tl.load(gate_weight + k[:, None] + weight_cols, mask=inside, other=0.0), gate_tile)
            up_tile = dot(x_tile, tl.load(up_weight + k[:, None] + weight_cols, mask=inside, other=0.0), up_tile)
        gate_tile = add_bias(gate_tile, gate_bias, cols, N)
        up_tile = add_bias(up_tile, up_bias, cols, N)
        _, _, place, inside = elements_of_tile(tile_m, tile_n, M, N, BLOCK_M, BLOCK_N)
        if gate is not None:
            tl.store(gate + place, gate_tile.to(gate.dtype.element_ty), mask=inside)
            tl.store(up + place, up_tile.to(up.dtype.element_ty), mask=inside)
        tl.store(y + place, (activate(gate_tile, ACTIVATION) * up_tile).to(y.dtype.element_ty), mask=inside)


@triton.jit
def linear_glu_bwd_dx_kernel(
    dy,  # (M, K), dense
    gate,  # (M, K), dense, and up
    up,
    gate_weight,  # (K, N), dense
    up_weight,
    dx,  # (M, N), dense
    M,
    N,
    K,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = place_of_tile(tile, tiles_m, tiles_n, GROUP)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        none = tl.zeros((BLOCK_M,), dtype=tl.float32)
        acc, none = add_product(
            acc, none, dy, gate, up, None, gate_weight, tile_m, tile_n, M, N, K, K, 1, N, 1, 0,
            ACTIVATION, 1, False, False, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        acc, none = add_product(
            acc, none, dy, gate, None, None, up_weight, tile_m, tile_n, M, N, K, K, 1, N, 1, 0,
            ACTIVATION, 1, True, False, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        _, _, place, inside = elements_of_tile(tile_m, tile_n, M, N, BLOCK_M, BLOCK_N)
        tl.store(dx + place, acc.to(dx.dtype.element_ty), mask=inside)


# Launchers.


def _configs(arch: int, dtype: torch.dtype, *strides: int, forward: bool) -> list[Config]:
    if arch == INTERPRETER:
        shapes = [(32, 32, 32, 4, 1)]
    elif dtype == torch.float32:  # no tensor cores
        shapes = [(32, 32, 16, 4, 1)]
    elif any(stride % 8 for stride in strides):  # rows that begin anywhere are read element by element
        shapes = [(64, 32, 32, 8, 2)]
    elif not 90 <= arch < 120:
        shapes = [(128, 64, 32, 8, 3), (64, 64, 32, 4, 3)] if forward else [(64, 64, 32, 8, 3)]
    elif arch < 100:
        shapes = [(128, 64, 64, 8, 3), (128, 64, 64, 8, 4)] if forward else [(128, 64, 64, 8, 2)]
    else:
        shapes = [(128, 64, 64, 8, 4)] if forward else [(64, 64, 64, 4, 2)]
    return as_configs(shapes)


def launch_linear_glu_fwd(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], panels: list[Tensor | None], activation: str,
    need_saved: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x_rows, F = as_rows(x), weights[0].shape[0]
    (M, K), N = x_rows.shape, F
    y = x.new_empty((*x.shape[:-1], F))
    gate, up = (torch.empty_like(y) if need_saved else None for _ in range(2))
    gate_weight, up_weight = (rounded(w, p, x.dtype) for w, p in zip(weights, panels, strict=True))
    gate_bias, up_bias = (None if bias is None else bias.to(x.dtype).contiguous() for bias in biases)
    if M and N:
        launch(
            linear_glu_fwd_kernel,
            persistent_grid(x.device, M, N),
            {
                "x": x_rows,
                "gate_weight": gate_weight,
                "up_weight": up_weight,
                "gate_bias": gate_bias,
                "up_bias": up_bias,
                "y": y,
                "gate": gate,
                "up": up,
                "M": M,
                "N": N,
                "K": K,
                "ACTIVATION": ACTIVATIONS[activation].value,
            },
            _configs(architecture(x.device), x.dtype, K, forward=True),
            f"{x.dtype} {activation} {power_of_2_key(M, N, K)}",
        )
    return y, *(x.new_empty(0) if saved is None else saved for saved in (gate, up))  # type: ignore[return-value]


def launch_linear_glu_bwd(
    dy: Tensor, x: Tensor, weights: list[Tensor], panels: list[Tensor | None], gate: Tensor, up: Tensor,
    activation: str, need_dx: bool, need_dweight: bool, need_dbias: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    dx = x.new_empty(x.shape if need_dx else 0)
    dy_rows, gate_rows, up_rows, x_rows = (as_rows(tensor) for tensor in (dy, gate, up, x))
    (M, K), N = dy_rows.shape, x.shape[-1]
    if need_dx and M and N:
        gate_weight, up_weight = (rounded(w, p, x.dtype) for w, p in zip(weights, panels, strict=True))
        launch(
            linear_glu_bwd_dx_kernel,
            persistent_grid(x.device, M, N),
            {
                "dy": dy_rows,
                "gate": gate_rows,
                "up": up_rows,
                "gate_weight": gate_weight,
                "up_weight": up_weight,
                "dx": dx,
                "M": M,
                "N": N,
                "K": K,
                "ACTIVATION": ACTIVATIONS[activation].value,
            },
            _configs(architecture(x.device), x.dtype, K, N, forward=False),
            f"{x.dtype} {activation} {power_of_2_key(M, N, K)}",
        )
    dweights = [weight.new_empty(weight.shape) for weight in weights] if need_dweight else []
    dbiases = [weight.new_empty(weight.shape[:1]) for weight in weights] if need_dbias else []
    for index, dweight in enumerate(dweights):
        launch_product(
            dy_rows.mT,
            x_rows,
            dweight,
            activation,
            saved=gate_rows.mT,
            other=up_rows.mT if index == 0 else None,
            gated=index == 1,
            row_sums=dbiases[index] if need_dbias else None,
        )
    return dx, dweights, dbiases
