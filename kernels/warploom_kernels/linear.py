"""y = activation(x weight^T + bias) and its gradients, by one matrix-product kernel, launchers below.

The kernel is persistent. The activation is made in the epilogue, out of the accumulator, and for ReLU a bit for each
element that is positive. In the backward pass the derivative is taken in the prologue of both products, from those bits
or from the sum before the activation, so that dh is never in memory; the bias gradient is summed on the way to the
weight's. Launchers take the arguments of the operators warploom::linear_fwd and _bwd.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from warploom_kernels._launch import architecture, launch, power_of_2_key
from warploom_kernels._products import (
    ACTIVATIONS,
    MASK_ALIGNMENT,
    activate,
    add_bias,
    add_product,
    as_rows,
    elements_of_tile,
    pack_bits,
    persistent_grid,
    place_of_tile,
    rounded,
    tile_configs,
)


@triton.jit
def linear_product_kernel(
    a,  # (M, K) by its strides
    saved,  # as a, in whose place derive(a, saved) is multiplied; or None
    other,  # see add_product
    mask,  # bits of the elements of a that count; or None
    b,  # (K, N) by its strides
    bias,  # (N,) or None
    y,  # (M, N), dense: activate(product + bias)
    h,  # (M, N), dense: product + bias; or None
    positive,  # (M, positive_stride) uint8: bits of where product + bias is; or None
    row_sums,  # (M,): sums of the left operand over K, by whoever owns the first columns; or None
    factor,  # () float32: the product's; or None
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    mask_stride,  # bytes
    positive_stride,
    ACTIVATION: tl.constexpr,
    MASK_AXIS: tl.constexpr,  # the axis of a that the bits of mask run along
    GATED: tl.constexpr,
    ADD: tl.constexpr,  # to what y holds
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.maximum(tl.cdiv(N, BLOCK_N), 1)  # without columns there are sums still
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = place_of_tile(tile, tiles_m, tiles_n, GROUP)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        sums = tl.zeros((BLOCK_M,), dtype=tl.float32)
        acc, sums = add_product(
            acc, sums, a, saved, other, mask, b, tile_m, tile_n, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
            mask_stride, ACTIVATION, MASK_AXIS, GATED, row_sums is not None, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        rows, cols, place, inside = elements_of_tile(tile_m, tile_n, M, N, BLOCK_M, BLOCK_N)
        if factor is not None:
            acc *= tl.load(factor)
        acc = add_bias(acc, bias, cols, N)
        if h is not None:
            tl.store(h + place, acc.to(h.dtype.element_ty), mask=inside)
        if positive is not None:
            byte = tile_n * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
            tl.store(
                positive + rows.to(tl.int64)[:, None] * positive_stride + byte[None, :],
                pack_bits((acc > 0) & (cols < N)[None, :], BLOCK_M, BLOCK_N),
                mask=(rows < M)[:, None] & (byte < positive_stride)[None, :],
            )
        if saved is None and mask is None:
            acc = activate(acc, ACTIVATION)
        if ADD:
            acc += tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + place, acc.to(y.dtype.element_ty), mask=inside)
        if row_sums is not None:
            tl.store(row_sums + rows, sums.to(row_sums.dtype.element_ty), mask=(rows < M) & (tile_n == 0))


# Launchers.


def launch_product(
    a: Tensor,  # (M, K)
    b: Tensor,  # (K, N)
    y: Tensor,  # dense, of M x N elements
    activation: str = "none",
    *,
    saved: Tensor | None = None,
    other: Tensor | None = None,
    gated: bool = False,
    mask: Tensor | None = None,
    mask_axis: int = 1,
    bias: Tensor | None = None,
    h: Tensor | None = None,
    positive: Tensor | None = None,
    row_sums: Tensor | None = None,
    factor: Tensor | None = None,
    add: bool = False,
) -> None:
    """Run the kernel; its arguments are explained there."""
    (M, K), N = a.shape, b.shape[1]
    if not M or (not N and row_sums is None):
        return
    derived = saved is not None or mask is not None
    costly = activation in ("gelu_tanh", "silu") or (activation == "relu2" and not derived)
    is_gated = gated or other is not None
    kind = ("gated " if is_gated else "") + ("d" if derived else "") + activation
    kind += " bits" if mask is not None or positive is not None else ""
    launch(
        linear_product_kernel,
        persistent_grid(a.device, M, N),
        {
            "a": a,
            "saved": saved,
            "other": other,
            "mask": mask,
            "b": b,
            "bias": bias,
            "y": y,
            "h": h,
            "positive": positive,
            "row_sums": row_sums,
            "factor": factor,
            "M": M,
            "N": N,
            "K": K,
            "stride_am": a.stride(0),
            "stride_ak": a.stride(1),
            "stride_bk": b.stride(0),
            "stride_bn": b.stride(1),
            "mask_stride": 0 if mask is None else mask.shape[-1],
            "positive_stride": 0 if positive is None else positive.shape[-1],
            "ACTIVATION": ACTIVATIONS[activation].value,
            "MASK_AXIS": mask_axis,
            "GATED": gated,
            "ADD": add,
        },
        tile_configs(architecture(a.device), [a], [b], derived=derived, costly=costly, gated=is_gated),
        f"{a.dtype} {kind} {power_of_2_key(M, N, K)}",
    )


def launch_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, panels: Tensor | None, activation: str, need_saved: bool
) -> tuple[Tensor, Tensor]:
    F = weight.shape[0]
    y = x.new_empty((*x.shape[:-1], F))
    saved, h, positive = x.new_empty(0), None, None
    if need_saved and activation == "relu":
        size = triton.cdiv(F, 8 * MASK_ALIGNMENT) * MASK_ALIGNMENT
        saved = positive = x.new_empty((*x.shape[:-1], size), dtype=torch.uint8)
    elif need_saved and activation != "none":
        saved = h = torch.empty_like(y)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    launch_product(as_rows(x), rounded(weight, panels, x.dtype).mT, y, activation, bias=bias, h=h, positive=positive)
    return y, saved


def launch_linear_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, panels: Tensor | None, saved: Tensor, activation: str,
    need_dx: bool, need_dweight: bool, need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx = x.new_empty(x.shape if need_dx else 0)
    dweight = weight.new_empty(weight.shape if need_dweight else 0)
    dbias = weight.new_empty(weight.shape[:1] if need_dbias else 0)
    dy_rows = as_rows(dy)
    mask = saved.contiguous() if activation == "relu" else None
    saved_rows = None if activation in ("none", "relu") else as_rows(saved)
    if need_dx:
        launch_product(dy_rows, rounded(weight, panels, x.dtype), dx, activation, saved=saved_rows, mask=mask)
    if need_dweight:
        launch_product(
            dy_rows.mT,
            as_rows(x),
            dweight,
            activation,
            saved=None if saved_rows is None else saved_rows.mT,
            mask=mask,
            mask_axis=0,
            row_sums=dbias if need_dbias else None,
        )
        if not weight.is_contiguous() and weight.mT.is_contiguous():  # as it lies in memory, so does its gradient
            dweight = dweight.mT.contiguous().mT
    return dx, dweight, dbias
