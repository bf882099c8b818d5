"""q, k, v = x weight^T + bias with three weights, and the gradients: three products in one launch, and one sum of three
in the accumulator. Launchers take the arguments of the operators warploom::linear_qkv_fwd and _bwd."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from warploom_kernels._launch import architecture, launch, num_multiprocessors, power_of_2_key
from warploom_kernels._products import (
    NONE,
    add_bias,
    add_plain_product,
    add_product,
    as_rows,
    elements_of_tile,
    persistent_grid,
    place_of_tile,
    rounded,
    tile_configs,
)


@triton.jit
def linear_qkv_each_kernel(
    a_q,  # (M, K) by their strides
    a_k,
    a_v,
    b_q,  # (K, N) by their strides
    b_k,
    b_v,
    y_q,  # (M, N), dense
    y_k,
    y_v,
    bias_q,  # (N,), or all None
    bias_k,
    bias_v,
    sums_q,  # (M,): sums of the left operand over K; or all None
    sums_k,
    sums_v,
    M_q,
    M_k,
    M_v,
    N_q,
    N_k,
    N_v,
    K,
    stride_am,
    stride_ak_q,
    stride_ak_k,
    stride_ak_v,
    stride_bk,
    stride_bn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The second axis of the grid is which of the three products; each is as in linear_product_kernel."""
    a, b, y, bias, row_sums, M, N, stride_ak = a_q, b_q, y_q, bias_q, sums_q, M_q, N_q, stride_ak_q
    if tl.program_id(1) == 1:
        a, b, y, M, N, stride_ak = a_k, b_k, y_k, M_k, N_k, stride_ak_k
        if bias_q is not None:
            bias = bias_k
        if sums_q is not None:
            row_sums = sums_k
    if tl.program_id(1) == 2:
        a, b, y, M, N, stride_ak = a_v, b_v, y_v, M_v, N_v, stride_ak_v
        if bias_q is not None:
            bias = bias_v
        if sums_q is not None:
            row_sums = sums_v
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.maximum(tl.cdiv(N, BLOCK_N), 1)  # as in linear_product_kernel
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = place_of_tile(tile, tiles_m, tiles_n, GROUP)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        sums = tl.zeros((BLOCK_M,), dtype=tl.float32)
        acc, sums = add_product(
            acc, sums, a, None, None, None, b, tile_m, tile_n, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
            0, NONE, 1, False, sums_q is not None, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        rows, cols, place, inside = elements_of_tile(tile_m, tile_n, M, N, BLOCK_M, BLOCK_N)
        acc = add_bias(acc, bias, cols, N)
        tl.store(y + place, acc.to(y_q.dtype.element_ty), mask=inside)
        if sums_q is not None:
            tl.store(row_sums + rows, sums.to(sums_q.dtype.element_ty), mask=(rows < M) & (tile_n == 0))


@triton.jit
def linear_qkv_bwd_dx_kernel(
    dq,  # (M, K), dense
    dk,
    dv,
    q_weight,  # (K, N), dense
    k_weight,
    v_weight,
    dx,  # (M, N), dense
    M,
    N,
    K_q,
    K_k,
    K_v,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = place_of_tile(tile, tiles_m, tiles_n, GROUP)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        acc = add_plain_product(acc, dq, q_weight, tile_m, tile_n, M, N, K_q, K_q, 1, N, 1, BLOCK_M, BLOCK_N, BLOCK_K)
        acc = add_plain_product(acc, dk, k_weight, tile_m, tile_n, M, N, K_k, K_k, 1, N, 1, BLOCK_M, BLOCK_N, BLOCK_K)
        acc = add_plain_product(acc, dv, v_weight, tile_m, tile_n, M, N, K_v, K_v, 1, N, 1, BLOCK_M, BLOCK_N, BLOCK_K)
        _, _, place, inside = elements_of_tile(tile_m, tile_n, M, N, BLOCK_M, BLOCK_N)
        tl.store(dx + place, acc.to(dx.dtype.element_ty), mask=inside)


# Launchers.


def _by_letter(name: str, values: Sequence[object]) -> dict[str, object]:
    return {f"{name}_{letter}": value for letter, value in zip("qkv", values, strict=True)}


def _launch_each(
    a: Sequence[Tensor], b: Sequence[Tensor], y: Sequence[Tensor], bias: Sequence[Tensor | None],
    row_sums: Sequence[Tensor | None],
) -> None:  # fmt: skip
    sizes = [(left.shape[0], right.shape[1]) for left, right in zip(a, b, strict=True)]
    K = a[0].shape[1]
    if not any(M * N for M, N in sizes) and row_sums[0] is None:
        return
    programs = num_multiprocessors(a[0].device)

    def grid(c):
        tiles = max(triton.cdiv(M, c["BLOCK_M"]) * max(triton.cdiv(N, c["BLOCK_N"]), 1) for M, N in sizes)
        return min(programs, tiles), 3

    launch(
        linear_qkv_each_kernel,
        grid,
        {
            **_by_letter("a", a),
            **_by_letter("b", b),
            **_by_letter("y", y),
            **_by_letter("bias", bias),
            **_by_letter("sums", row_sums),
            **_by_letter("M", [M for M, _ in sizes]),
            **_by_letter("N", [N for _, N in sizes]),
            "K": K,
            "stride_am": a[0].stride(0),
            **_by_letter("stride_ak", [left.stride(1) for left in a]),
            "stride_bk": b[0].stride(0),
            "stride_bn": b[0].stride(1),
        },
        tile_configs(architecture(a[0].device), a, b),
        f"{a[0].dtype} {power_of_2_key(*sizes[0], K)}",
    )


def launch_linear_qkv_fwd(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], panels: list[Tensor | None]
) -> list[Tensor]:
    outputs = [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]
    columns = [rounded(w, p, x.dtype).mT for w, p in zip(weights, panels, strict=True)]
    _launch_each(
        [as_rows(x)] * 3,
        columns,
        outputs,
        [None if bias is None else bias.to(x.dtype).contiguous() for bias in biases],
        [None] * 3,
    )
    return outputs


def launch_linear_qkv_bwd(
    x: Tensor, dys: list[Tensor], weights: list[Tensor], panels: list[Tensor | None], need_dx: bool,
    need_dweight: bool, need_dbias: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    dx = x.new_empty(x.shape if need_dx else 0)
    x_rows, dy_rows = as_rows(x), [as_rows(dy) for dy in dys]
    M, N = x_rows.shape
    if need_dx and M and N:
        rows = [rounded(w, p, x.dtype) for w, p in zip(weights, panels, strict=True)]
        launch(
            linear_qkv_bwd_dx_kernel,
            persistent_grid(x.device, M, N),
            {
                **{f"d{letter}": dy for letter, dy in zip("qkv", dy_rows, strict=True)},
                **{f"{letter}_weight": weight for letter, weight in zip("qkv", rows, strict=True)},
                "dx": dx,
                "M": M,
                "N": N,
                **_by_letter("K", [dy.shape[1] for dy in dy_rows]),
            },
            tile_configs(architecture(x.device), dy_rows, rows),
            f"{x.dtype} {power_of_2_key(M, N, dy_rows[0].shape[1])}",
        )
    dweights = [weight.new_empty(weight.shape) for weight in weights] if need_dweight else []
    dbiases = [weight.new_empty(weight.shape[:1]) for weight in weights] if need_dbias else []
    if need_dweight:
        _launch_each(
            [dy.mT for dy in dy_rows], [x_rows] * 3, dweights, [None] * 3, dbiases if need_dbias else [None] * 3
        )
    return dx, dweights, dbiases
