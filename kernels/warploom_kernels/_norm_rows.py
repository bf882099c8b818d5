"""Rows scaled to unit variance or unit mean square, forward and backward: the kernels of layer_norm and rms_norm.

A row of up to WHOLE_ROW elements is read once and lives in registers. A wider one, up to 64k, is taken in blocks: its
statistics first, then its results, the second reading coming out of the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from warploom_kernels._column_sums import launch_column_sums
from warploom_kernels._launch import INTERPRETER, Config, architecture, launch, num_multiprocessors, power_of_2_key

MAX_WIDTH = 65536
# In the forward pass the row, weight and bias are in registers; in the backward pass the row, its gradient, and two
# sums over rows in float32.
WHOLE_ROW_FWD, WHOLE_ROW_BWD = 16384, 8192


@triton.jit
def _load_rows(base, rows, cols, N, C):
    """(ROWS, BLOCK_C) float32; zeros outside."""
    inside = (rows < N)[:, None] & (cols < C)[None, :]
    return tl.load(base + rows[:, None] * C + cols[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_rows(base, rows, cols, N, C, values):
    inside = (rows < N)[:, None] & (cols < C)[None, :]
    tl.store(base + rows[:, None] * C + cols[None, :], values, mask=inside)


@triton.jit
def _load_columns(base, cols, C):
    """(1, BLOCK_C) float32; zeros outside."""
    return tl.load(base + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _stream_rows(x, residual, stream, rows, cols, N, C):
    """x + residual, as it is stored, so that the backward pass sees the numbers that were normalised."""
    x_rows = _load_rows(x, rows, cols, N, C)
    if residual is not None:
        rounded = (x_rows + _load_rows(residual, rows, cols, N, C)).to(stream.dtype.element_ty)
        _store_rows(stream, rows, cols, N, C, rounded)
        x_rows = rounded.to(tl.float32)
    return x_rows


@triton.jit
def _normalised(x_rows, mean, rstd, weight, bias, cols, C):
    y = (x_rows - mean[:, None]) * rstd[:, None] * _load_columns(weight, cols, C)
    if bias is not None:
        y += _load_columns(bias, cols, C)
    return y


@triton.jit
def norm_fwd_kernel(
    x,  # (N, C), dense
    residual,  # (N, C) or None
    weight,  # (C,)
    bias,  # (C,) or None
    y,  # (N, C)
    stream,  # (N, C): x + residual; None without a residual
    mean,  # (N,) float32; None: rows are not centred, as in RMSNorm
    rstd,  # (N,) float32
    N,
    C,
    eps,
    WHOLE: tl.constexpr,  # a block holds a row
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # row * C passes 2**31 for logits: 64k rows of 50k words.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    block = tl.arange(0, BLOCK_C)
    mean_rows = tl.zeros((ROWS,), dtype=tl.float32)
    squares = tl.zeros((ROWS,), dtype=tl.float32)  # sum of (x - mean)^2 over the columns so far
    if WHOLE:
        x_rows = _stream_rows(x, residual, stream, rows, block, N, C)
        centred = x_rows
        if mean is not None:
            mean_rows = tl.sum(x_rows, axis=1) / C
            # Lanes past C read 0, which is not the mean.
            centred = tl.where((block < C)[None, :], x_rows - mean_rows[:, None], 0.0)
        squares = tl.sum(centred * centred, axis=1)
    else:
        for first in range(0, C, BLOCK_C):
            x_rows = _stream_rows(x, residual, stream, rows, first + block, N, C)
            if mean is None:
                squares += tl.sum(x_rows * x_rows, axis=1)
            else:
                # The two parts' squares about the mean of both (Chan et al., 1983): sums of x^2 would cancel.
                count = tl.minimum(C - first, BLOCK_C)
                mean_block = tl.sum(x_rows, axis=1) / count
                centred = tl.where((first + block < C)[None, :], x_rows - mean_block[:, None], 0.0)
                apart = mean_block - mean_rows
                squares += tl.sum(centred * centred, axis=1) + apart * apart * (first * (count / (first + count)))
                mean_rows += apart * (count / (first + count))
    scale = 1.0 / tl.sqrt(squares / C + eps)
    tl.store(rstd + rows, scale, mask=rows < N)  # float32: in bf16 its 8 bits would reach every gradient of the row
    if mean is not None:
        tl.store(mean + rows, mean_rows, mask=rows < N)
    if WHOLE:
        _store_rows(y, rows, block, N, C, _normalised(x_rows, mean_rows, scale, weight, bias, block, C))
    else:
        tl.debug_barrier()  # the stream was written by other threads of this program
        source = x if residual is None else stream
        for first in range(0, C, BLOCK_C):
            cols = first + block
            x_rows = _load_rows(source, rows, cols, N, C)
            _store_rows(y, rows, cols, N, C, _normalised(x_rows, mean_rows, scale, weight, bias, cols, C))


@triton.jit
def _normalised_input(x, mean, rstd, rows, cols, N, C):
    x_hat = _load_rows(x, rows, cols, N, C)
    if mean is not None:
        x_hat -= tl.load(mean + rows, mask=rows < N, other=0.0)[:, None]
    return x_hat * tl.load(rstd + rows, mask=rows < N, other=0.0)[:, None]


@triton.jit
def _input_gradient(dx_hat, x_hat, along_ones, along_x, scale, dstream, rows, cols, N, C):
    # y ignores the mean and the length of x, so the parts of dx_hat along 1 and along x_hat carry no gradient.
    dx_rows = scale[:, None] * (dx_hat - along_ones[:, None] - x_hat * along_x[:, None])
    if dstream is not None:
        dx_rows += _load_rows(dstream, rows, cols, N, C)
    return dx_rows


@triton.jit
def norm_bwd_kernel(
    dy,  # (N, C), dense
    dstream,  # (N, C) or None
    x,  # (N, C)
    weight,  # (C,)
    mean,  # (N,) float32 or None
    rstd,  # (N,) float32
    dx,  # (N, C)
    parts,  # (1 or 2, programs, C) float32: of dweight, and of dbias if mean is given
    N,
    C,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,  # holds a row
    PREFETCH: tl.constexpr,  # rows that are on their way while one is worked on, itself counted
):
    # Each program takes every num_programs-th block of rows and sums its dweight in registers; a second kernel adds the
    # programs up. No atomics, so the sum has one order and the result one value.
    cols = tl.arange(0, BLOCK_C)
    weight_row = _load_columns(weight, cols, C)
    dweight = tl.zeros((ROWS, BLOCK_C), dtype=tl.float32)
    dbias = tl.zeros((ROWS, BLOCK_C), dtype=tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0), num_stages=PREFETCH):
        rows = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        x_hat = _normalised_input(x, mean, rstd, rows, cols, N, C)
        dy_rows = _load_rows(dy, rows, cols, N, C)
        dweight += dy_rows * x_hat
        dx_hat = dy_rows * weight_row
        along_ones = tl.zeros((ROWS,), dtype=tl.float32)
        if mean is not None:
            dbias += dy_rows
            along_ones = tl.sum(dx_hat, axis=1) / C
        along_x = tl.sum(dx_hat * x_hat, axis=1) / C
        scale = tl.load(rstd + rows, mask=rows < N, other=0.0)
        dx_rows = _input_gradient(dx_hat, x_hat, along_ones, along_x, scale, dstream, rows, cols, N, C)
        _store_rows(dx, rows, cols, N, C, dx_rows)
    part = parts + tl.program_id(0).to(tl.int64) * C + cols
    tl.store(part, tl.sum(dweight, axis=0), mask=cols < C)
    if mean is not None:
        tl.store(part + tl.num_programs(0).to(tl.int64) * C, tl.sum(dbias, axis=0), mask=cols < C)


@triton.jit
def norm_bwd_wide_kernel(
    dy, dstream, x, weight, mean, rstd, dx, N, C, BLOCK_C: tl.constexpr
):  # as in norm_bwd_kernel, one row a program
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    block = tl.arange(0, BLOCK_C)
    along_ones = tl.zeros((1,), dtype=tl.float32)
    along_x = tl.zeros((1,), dtype=tl.float32)
    for first in range(0, C, BLOCK_C):
        cols = first + block
        dx_hat = _load_rows(dy, rows, cols, N, C) * _load_columns(weight, cols, C)
        along_x += tl.sum(dx_hat * _normalised_input(x, mean, rstd, rows, cols, N, C), axis=1) / C
        if mean is not None:
            along_ones += tl.sum(dx_hat, axis=1) / C
    scale = tl.load(rstd + rows)
    for first in range(0, C, BLOCK_C):
        cols = first + block
        dx_hat = _load_rows(dy, rows, cols, N, C) * _load_columns(weight, cols, C)
        x_hat = _normalised_input(x, mean, rstd, rows, cols, N, C)
        dx_rows = _input_gradient(dx_hat, x_hat, along_ones, along_x, scale, dstream, rows, cols, N, C)
        _store_rows(dx, rows, cols, N, C, dx_rows)


@triton.jit
def norm_bwd_weight_kernel(
    dy, x, mean, rstd, parts, N, C, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):  # as in norm_bwd_kernel; a program takes a block of columns of every num_programs(0)-th block of rows
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    dweight = tl.zeros((ROWS, BLOCK_C), dtype=tl.float32)
    dbias = tl.zeros((ROWS, BLOCK_C), dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        rows = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        dy_rows = _load_rows(dy, rows, cols, N, C)
        dweight += dy_rows * _normalised_input(x, mean, rstd, rows, cols, N, C)
        dbias += dy_rows
    part = parts + tl.program_id(0).to(tl.int64) * C + cols
    tl.store(part, tl.sum(dweight, axis=0), mask=cols < C)
    if mean is not None:
        tl.store(part + tl.num_programs(0).to(tl.int64) * C, tl.sum(dbias, axis=0), mask=cols < C)


# Launchers.


def _warps(elements: int, per_thread: int) -> int:
    return min(max(triton.next_power_of_2(elements) // (32 * per_thread), 1), 16)


def _fwd_configs(C: int, arch: int) -> list[Config]:
    block = triton.next_power_of_2(C)
    if arch == INTERPRETER:
        return [Config({"WHOLE": C <= 256, "ROWS": 2 if C <= 256 else 1, "BLOCK_C": min(block, 256)})]
    if C > WHOLE_ROW_FWD:
        return [Config({"WHOLE": False, "ROWS": 1, "BLOCK_C": width}, num_warps=16) for width in (8192, 4096)]
    rows = max(1, 1024 // block)
    shapes = [(rows, 8), (rows, 16), (4 * rows if block <= 2048 else 1, 16)]
    return [
        Config({"WHOLE": True, "ROWS": n, "BLOCK_C": block}, num_warps=32 if block > 8192 else _warps(n * block, each))
        for n, each in dict.fromkeys(shapes)
    ]


def _bwd_configs(C: int, arch: int) -> list[Config]:
    block = triton.next_power_of_2(C)
    if arch == INTERPRETER:
        return [Config({"ROWS": 2, "BLOCK_C": block, "PREFETCH": 2})]
    rows = max(1, 1024 // block)
    if block > 4096:  # 16 warps of 128 registers: no room for rows on their way (it spilled for sm_100)
        return [Config({"ROWS": 1, "BLOCK_C": block, "PREFETCH": 1}, num_warps=16)]
    shapes = [(rows, 2, 8), (rows, 1, 8), (4 * rows if block <= 1024 else rows, 2, 16)]
    return [
        Config({"ROWS": n, "BLOCK_C": block, "PREFETCH": prefetch}, num_warps=_warps(n * block, each))
        for n, prefetch, each in dict.fromkeys(shapes)
    ]


def launch_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, *, centred: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, stream (empty without a residual), mean (empty unless centred), rstd."""
    C = x.shape[-1]
    x = x.contiguous()
    y = torch.empty_like(x)
    stream = x.new_empty(0) if residual is None else torch.empty_like(x)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    mean = torch.empty_like(rstd) if centred else rstd.new_empty(0)
    N = rstd.numel()
    if N:
        launch(
            norm_fwd_kernel,
            lambda constants: (triton.cdiv(N, constants["ROWS"]),),
            {
                "x": x,
                "residual": None if residual is None else residual.contiguous(),
                "weight": weight.contiguous(),
                "bias": None if bias is None else bias.contiguous(),
                "y": y,
                "stream": None if residual is None else stream,
                "mean": mean if centred else None,
                "rstd": rstd,
                "N": N,
                "C": C,
                "eps": eps,
            },
            _fwd_configs(C, architecture(x.device)),
            f"{x.dtype} {power_of_2_key(N, C)}",
        )
    return y, stream, mean, rstd


def launch_norm_bwd(
    dy: Tensor, dstream: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias (empty without a mean)."""
    C = x.shape[-1]
    N = rstd.numel()
    x = x.contiguous()
    dx = torch.empty_like(x)
    arch = architecture(x.device)
    arguments = {
        "dy": dy.contiguous(),
        "dstream": None if dstream is None else dstream.contiguous(),
        "x": x,
        "weight": weight.contiguous(),
        "mean": None if mean is None else mean.contiguous(),
        "rstd": rstd.contiguous(),
        "dx": dx,
        "N": N,
        "C": C,
    }
    key = f"{x.dtype} {power_of_2_key(N, C)}"
    # Two programs a multiprocessor hide each other's loads.
    programs = min(N, 2 * num_multiprocessors(x.device))
    kinds = 1 if mean is None else 2
    wide = C > (WHOLE_ROW_BWD if arch != INTERPRETER else 256)
    if wide:
        columns = 256 if arch == INTERPRETER else 512
        programs = min(triton.cdiv(N, 4), triton.cdiv(8 * programs, triton.cdiv(C, columns)))
    parts = x.new_empty((kinds, programs, C), dtype=torch.float32)
    if N and wide:
        widths = (256,) if arch == INTERPRETER else (4096, 8192)
        configs = [Config({"BLOCK_C": width}, num_warps=16) for width in widths]
        launch(norm_bwd_wide_kernel, lambda _: (N,), arguments, configs, key)
        rest = {name: arguments[name] for name in ("dy", "x", "mean", "rstd", "N", "C")}
        launch(
            norm_bwd_weight_kernel,
            lambda constants: (programs, triton.cdiv(C, constants["BLOCK_C"])),
            {**rest, "parts": parts},
            [Config({"ROWS": 4, "BLOCK_C": columns}, num_warps=4)],
        )
    elif N:
        configs = _bwd_configs(C, arch)
        launch(norm_bwd_kernel, lambda _: (programs,), {**arguments, "parts": parts}, configs, key)
    dweight, dbias = launch_column_sums(parts, weight.dtype)
    return dx, dweight, dbias
