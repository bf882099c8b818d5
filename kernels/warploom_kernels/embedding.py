"""Rows of a table by token, and the gradient of the table without atomics: positions are sorted by token, and the
program of a token's first one sums over all of them, in their order. Launchers take the arguments of the operators
warploom::embedding_fwd, _bwd and _bwd_into."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from warploom_kernels._launch import INTERPRETER, Config, architecture, launch
from warploom_kernels._products import as_rows


@triton.jit
def embedding_fwd_kernel(
    tokens,  # (N,) int64
    weight,  # (V, C) by its row stride
    y,  # (N, C), dense
    C,
    stride_v,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    token = tl.load(tokens + row)
    tl.store(y + row * C + cols, tl.load(weight + token * stride_v + cols, mask=cols < C), mask=cols < C)


@triton.jit
def embedding_bwd_kernel(
    dy,  # (N, C), dense
    sorted_tokens,  # (N,) int64
    order,  # (N,) int64: where each came from
    dweight,  # (V, C), dense; rows of tokens that do not occur stay as they are
    N,
    C,
    ADD: tl.constexpr,  # to what dweight holds
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    token = tl.load(sorted_tokens + first)
    if token != tl.load(sorted_tokens + first - 1, mask=first > 0, other=-1):
        total = tl.zeros((BLOCK_C,), dtype=tl.float32)
        num_same = ROWS
        while num_same == ROWS:
            index = first + tl.arange(0, ROWS)
            same = tl.load(sorted_tokens + index, mask=index < N, other=-1) == token
            rows = tl.load(order + index, mask=same, other=0)
            inside = same[:, None] & (cols < C)[None, :]
            total += tl.sum(tl.load(dy + rows[:, None] * C + cols[None, :], mask=inside, other=0.0).to(tl.float32), 0)
            num_same = tl.sum(same.to(tl.int32), axis=0)
            first += ROWS
        place = dweight + token * C + cols
        if ADD:
            total += tl.load(place, mask=cols < C, other=0.0).to(tl.float32)
        tl.store(place, total.to(dweight.dtype.element_ty), mask=cols < C)


# Launchers.


def _config(tensor: Tensor, C: int, most: int) -> Config:
    block = min(most, triton.next_power_of_2(C))
    return Config({"BLOCK_C": min(block, 32) if architecture(tensor.device) == INTERPRETER else block}, num_warps=4)


def launch_embedding_fwd(weight: Tensor, tokens: Tensor) -> Tensor:
    C = weight.shape[1]
    weight = weight if weight.stride(1) == 1 or C == 1 else weight.contiguous()
    tokens = tokens.contiguous()
    y = weight.new_empty((*tokens.shape, C))
    if y.numel():
        launch(
            embedding_fwd_kernel,
            lambda c: (tokens.numel(), triton.cdiv(C, c["BLOCK_C"])),
            {"tokens": tokens, "weight": weight, "y": y, "C": C, "stride_v": weight.stride(0)},
            [_config(weight, C, 1024)],
        )
    return y


def launch_embedding_bwd(dy: Tensor, tokens: Tensor, num_embeddings: int) -> Tensor:
    dweight = dy.new_zeros((num_embeddings, dy.shape[-1]))
    _sum_rows(dy, tokens, dweight, add=False)
    return dweight


def launch_embedding_bwd_into(dy: Tensor, tokens: Tensor, dweight: Tensor) -> None:
    dense = dweight.contiguous()
    _sum_rows(dy, tokens, dense, add=True)
    if dense is not dweight:
        dweight.copy_(dense)


def _sum_rows(dy: Tensor, tokens: Tensor, dweight: Tensor, *, add: bool) -> None:
    N, C = tokens.numel(), dy.shape[-1]
    if not N or not C:
        return
    sorted_tokens, order = torch.sort(tokens.reshape(-1), stable=True)
    config = _config(dy, C, 256)
    launch(
        embedding_bwd_kernel,
        lambda c: (N, triton.cdiv(C, c["BLOCK_C"])),
        {
            "dy": as_rows(dy),
            "sorted_tokens": sorted_tokens,
            "order": order,
            "dweight": dweight,
            "N": N,
            "C": C,
            "ADD": add,
        },
        [Config({**config.constants, "ROWS": 16}, num_warps=4)],
    )
