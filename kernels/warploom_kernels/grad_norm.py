"""The Euclidean norm of all elements of many tensors, in one launch and a second that adds up what the programs of the
first found. Sums are float64. The launcher takes the arguments of the operator warploom::grad_norm_fwd."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from warploom_kernels._launch import Config, launch
from warploom_kernels._tensor_lists import PIECE, load_address, load_size, tables


@triton.jit
def grad_norm_squares_kernel(
    addresses,  # (n,) int64: of grads
    sizes,  # (n,) int64: elements
    pieces,  # (programs, 2) int32: which tensor, which piece of it
    grad,  # one of them, for its type alone
    parts,  # (programs,) float64
    EVEN: tl.constexpr,  # Tables.is_even
    PIECE: tl.constexpr,
):
    tensor = tl.load(pieces + 2 * tl.program_id(0)).to(tl.int64)
    index = tl.load(pieces + 2 * tl.program_id(0) + 1).to(tl.int64) * PIECE + tl.arange(0, PIECE)
    grads = load_address(addresses + tensor, tl.pointer_type(grad.dtype.element_ty), EVEN) + index
    # Squares of float32 numbers leave float32.
    g = tl.load(grads, mask=index < load_size(sizes + tensor, EVEN), other=0.0).to(tl.float64)
    tl.store(parts + tl.program_id(0), tl.sum(g * g, axis=0))


@triton.jit
def grad_norm_finish_kernel(
    parts,  # (P,) float64
    norm,  # () float32
    P,
    BLOCK: tl.constexpr,
):
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(0, P, BLOCK):
        index = first + tl.arange(0, BLOCK)
        total += tl.load(parts + index, mask=index < P, other=0.0)
    tl.store(norm, tl.sqrt(tl.sum(total, axis=0)).to(tl.float32))


# Launcher.


def launch_grad_norm_fwd(grads: list[Tensor]) -> Tensor:
    # Any order of the elements will do, but they must lie side by side.
    dense = [g if torch.ops.aten.is_non_overlapping_and_dense.default(g) else g.contiguous() for g in grads]
    table = tables([dense])
    parts = grads[0].new_empty(len(table.pieces), dtype=torch.float64)
    norm = grads[0].new_empty((), dtype=torch.float32)
    if len(table.pieces):
        launch(
            grad_norm_squares_kernel,
            lambda _: (len(table.pieces),),
            {**table.arguments, "grad": grads[0], "parts": parts},
            [Config({"PIECE": PIECE}, num_warps=8)],
        )
    launch(
        grad_norm_finish_kernel,
        lambda _: (1,),
        {"parts": parts, "norm": norm, "P": len(table.pieces)},
        [Config({"BLOCK": 1024}, num_warps=4)],
    )
    return norm
