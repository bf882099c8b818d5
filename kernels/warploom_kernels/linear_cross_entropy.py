"""Cross-entropy of hidden weight^T against target classes, a chunk of the vocabulary at a time.

Forward: programs walk through shares of the vocabulary with a running maximum and sum for each row; logits exist as one
tile in registers. Backward: the tiles are made again, as gradients of the logits in 16 bits, for one chunk of the
vocabulary; from it the chunk's rows of dweight, once, and its share of dhidden, which is summed in float32. Launchers
take the arguments of the operators warploom::linear_cross_entropy_fwd and _bwd.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from warploom_kernels._launch import INTERPRETER, Config, architecture, launch, num_multiprocessors, power_of_2_key
from warploom_kernels._products import (
    add_plain_product,
    as_configs,
    as_rows,
    elements_of_tile,
    interpreted_shapes,
    persistent_grid,
    place_of_tile,
    tile_configs,
)
from warploom_kernels.linear import launch_product


@triton.jit
def linear_cross_entropy_lse_kernel(
    hidden,  # (N, C), dense
    weight,  # (V, C), dense
    targets,  # (N,) int64
    parts,  # (shares, N) float32: log-sum-exp of each row over a share of the vocabulary
    target_logits,  # (N,) float32: written by the share that holds the target
    N,
    V,
    C,
    share,  # classes of a share, a multiple of BLOCK_N
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Programs that lie side by side have the same share of the vocabulary, which the cache then holds."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_tile = tl.program_id(1) * (share // BLOCK_N)
    last_tile = tl.minimum(first_tile + share // BLOCK_N, tl.cdiv(V, BLOCK_N))
    target = tl.load(targets + rows, mask=rows < N, other=-1)
    largest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for tile in range(first_tile, last_tile):
        logits = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        logits = add_plain_product(
            logits, hidden, weight, tl.program_id(0), tile, N, V, C, C, 1, 1, C, BLOCK_M, BLOCK_N, BLOCK_K
        )
        cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        hit = cols[None, :] == target[:, None]
        logit = tl.sum(tl.where(hit, logits, 0.0), axis=1)
        here = (target >= tile * BLOCK_N) & (target < tl.minimum((tile + 1) * BLOCK_N, V))
        tl.store(target_logits + rows, logit, mask=(rows < N) & here)
        logits = tl.where((cols < V)[None, :], logits, float("-inf"))
        new = tl.maximum(largest, tl.max(logits, axis=1))
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(largest - base) + tl.sum(tl.exp(logits - base[:, None]), axis=1)
        largest = new
    lse = tl.where(total == 0.0, float("-inf"), largest + tl.log(total))
    tl.store(parts + tl.program_id(1).to(tl.int64) * N + rows, lse, mask=rows < N)


@triton.jit
def linear_cross_entropy_dlogits_kernel(
    hidden,  # (N, C), dense
    weight,  # (V, C), dense: the chunk's rows
    targets,  # (N,) int64
    lse,  # (N,) float32
    dlogits,  # (N, V), dense: the gradients of the sum of losses
    N,
    V,
    C,
    first_class,  # of the chunk
    ignore_index,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(N, BLOCK_M), tl.cdiv(V, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = place_of_tile(tile, tiles_m, tiles_n, GROUP)
        logits = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        logits = add_plain_product(
            logits, hidden, weight, tile_m, tile_n, N, V, C, C, 1, 1, C, BLOCK_M, BLOCK_N, BLOCK_K
        )
        rows, cols, place, inside = elements_of_tile(tile_m, tile_n, N, V, BLOCK_M, BLOCK_N)
        target = tl.load(targets + rows, mask=rows < N, other=ignore_index)
        row_lse = tl.load(lse + rows, mask=rows < N, other=0.0)
        hit = (cols + first_class)[None, :] == target[:, None]
        d = tl.exp(logits - row_lse[:, None]) - tl.where(hit, 1.0, 0.0)
        # An ignored row's logits may be infinite.
        d = tl.where((target != ignore_index)[:, None], d, 0.0)
        tl.store(dlogits + place, d.to(dlogits.dtype.element_ty), mask=inside)


# Launchers.

CHUNKS = 8  # of the vocabulary, in the backward: dhidden is read and written once for each
SMALLEST_CHUNK = 4096


def _lse_configs(arch: int, hidden: Tensor, V: int) -> list[Config]:
    N, C = hidden.shape
    if arch == INTERPRETER:
        shapes = interpreted_shapes(N, V, C)
    elif hidden.dtype == torch.float32:  # no tensor cores
        shapes = [(64, 64, 16, 8, 1)]
    elif C % 8:  # rows that begin anywhere are read element by element
        shapes = [(64, 64, 32, 8, 2)]
    elif not 90 <= arch < 120:
        shapes = [(128, 128, 32, 8, 3), (64, 128, 32, 4, 3)]
    else:
        shapes = [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4)]
    return as_configs(shapes)


def launch_linear_cross_entropy_fwd(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, need_dhidden: bool, need_dweight: bool,
    sharded: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    assert not (need_dhidden or need_dweight)
    x, w, targets = as_rows(hidden), weight.to(hidden.dtype).contiguous(), targets.reshape(-1).contiguous()
    (N, C), V = x.shape, weight.shape[0]
    arch = architecture(x.device)
    configs = _lse_configs(arch, x, V)
    block = max(config.constants["BLOCK_N"] for config in configs)
    rows = triton.cdiv(max(N, 1), min(config.constants["BLOCK_M"] for config in configs))
    # As many shares as keep the card busy with four programs for each multiprocessor.
    wanted = min(triton.cdiv(4 * num_multiprocessors(x.device), rows), triton.cdiv(V, block))
    share = triton.cdiv(triton.cdiv(V, wanted), block) * block
    shares = triton.cdiv(V, share)
    parts = x.new_empty((shares, N), dtype=torch.float32)
    target_logits = x.new_zeros(N, dtype=torch.float32)
    if N:
        launch(
            linear_cross_entropy_lse_kernel,
            lambda c: (triton.cdiv(N, c["BLOCK_M"]), shares),
            {
                "hidden": x,
                "weight": w,
                "targets": targets,
                "parts": parts,
                "target_logits": target_logits,
                "N": N,
                "V": V,
                "C": C,
                "share": share,
            },
            configs,
            f"{x.dtype} {power_of_2_key(N, V, C)}",
        )
    lse = torch.logsumexp(parts, 0)
    kept = targets != ignore_index
    loss = (lse - target_logits).where(kept, 0.0).sum(dtype=torch.float64).float()
    return loss, kept.sum().float(), lse, hidden.new_empty(0), weight.new_empty(0)


def launch_linear_cross_entropy_bwd(
    scale: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, ignore_index: int,
    need_dhidden: bool, need_dweight: bool, sharded: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, w, targets = as_rows(hidden), weight.to(hidden.dtype).contiguous(), targets.reshape(-1).contiguous()
    (N, C), V = x.shape, weight.shape[0]
    scale, lse = scale.float(), lse.contiguous()
    smallest = 128 if architecture(x.device) == INTERPRETER else SMALLEST_CHUNK  # tests have small vocabularies
    chunk = min(V, max(triton.cdiv(triton.cdiv(V, CHUNKS), 128) * 128, smallest))
    dlogits_memory = x.new_empty(N * chunk)
    dhidden = x.new_zeros((N, C) if need_dhidden else 0, dtype=torch.float32)
    dweight = weight.new_zeros(weight.shape) if not N else weight.new_empty(weight.shape if need_dweight else 0)
    # 0 of an ignored row times what is not finite would be NaN.
    kept_x = x.where((targets != ignore_index)[:, None], 0.0) if need_dweight else x
    for first in range(0, V if N else 0, chunk):
        classes = min(chunk, V - first)
        rows = w[first : first + classes]
        dlogits = dlogits_memory[: N * classes].view(N, classes)
        launch(
            linear_cross_entropy_dlogits_kernel,
            persistent_grid(x.device, N, classes),
            {
                "hidden": x,
                "weight": rows,
                "targets": targets,
                "lse": lse,
                "dlogits": dlogits,
                "N": N,
                "V": classes,
                "C": C,
                "first_class": first,
                "ignore_index": ignore_index,
            },
            tile_configs(architecture(x.device), [x], [rows.mT], costly=True),
            f"{x.dtype} {power_of_2_key(N, classes, C)}",
        )
        if need_dhidden:
            launch_product(dlogits, rows, dhidden, factor=scale, add=first > 0)
        if need_dweight:
            launch_product(dlogits.mT, kept_x, dweight[first : first + classes], factor=scale)
    dhidden = dhidden.to(x.dtype).view(hidden.shape) if need_dhidden else hidden.new_empty(0)
    return dhidden, dweight if need_dweight else weight.new_empty(0)
