"""The second stage of sums over rows: the programs' partial sums added up, in one order, without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from warploom_kernels._launch import INTERPRETER, Config, architecture, launch


@triton.jit
def column_sums_kernel(
    parts,  # (1 or 2, P, C) float32, dense
    first_sums,  # (C,)
    second_sums,  # (C,) or None
    P,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    kind = tl.program_id(1)
    total = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for first in range(0, P, BLOCK_P):
        rows = (kind * P + first + tl.arange(0, BLOCK_P)).to(tl.int64)
        inside = (first + tl.arange(0, BLOCK_P) < P)[:, None] & (cols < C)[None, :]
        total += tl.load(parts + rows[:, None] * C + cols[None, :], mask=inside, other=0.0)
    sums = tl.sum(total, axis=0)
    if second_sums is None:
        tl.store(first_sums + cols, sums, mask=cols < C)
    else:
        tl.store(first_sums + cols, sums, mask=(cols < C) & (kind == 0))
        tl.store(second_sums + cols, sums, mask=(cols < C) & (kind == 1))


def launch_column_sums(parts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sum (1 or 2, P, C) over P: (C,) and (C,), the second empty if there is one kind."""
    kinds, P, C = parts.shape
    first = parts.new_empty(C, dtype=dtype)
    second = parts.new_empty(C if kinds == 2 else 0, dtype=dtype)
    rows, cols = (4, 64) if architecture(parts.device) == INTERPRETER else (32, 32)
    if C:
        launch(
            column_sums_kernel,
            lambda constants: (triton.cdiv(C, constants["BLOCK_C"]), kinds),
            {"parts": parts, "first_sums": first, "second_sums": second if kinds == 2 else None, "P": P, "C": C},
            [Config({"BLOCK_P": rows, "BLOCK_C": cols}, num_warps=4)],
        )
    return first, second
