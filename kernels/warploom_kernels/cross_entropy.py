"""Cross-entropy of logits with the gradient made in the same kernel: a row's maximum and sum in a first reading, its
gradient in a second, which comes out of the cache. Launchers take the arguments of warploom::cross_entropy_fwd and
_fwd_inplace."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from warploom_kernels._launch import INTERPRETER, Config, architecture, launch, power_of_2_key


@triton.jit
def cross_entropy_kernel(
    logits,  # (N, V), dense
    targets,  # (N,) int64
    losses,  # (N,) float32
    dlogits,  # (N, V), dense, may be logits; or None
    scale,  # () float32: what the gradient of the sum is multiplied by
    V,
    ignore_index,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    kept = target != ignore_index
    block = tl.arange(0, BLOCK_V)
    # A lane for itself: the lanes meet once, after the last block.
    largest = tl.full((BLOCK_V,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for first in range(0, V, BLOCK_V):
        cols = first + block
        x = tl.load(logits + row * V + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, x)
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(largest - base) + tl.exp(x - base)
        largest = new
    top = tl.max(largest, axis=0)
    lse = top + tl.log(tl.sum(total * tl.exp(largest - top), axis=0))
    of_target = tl.load(logits + row * V + tl.where(kept, target, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(kept, lse - of_target, 0.0))
    if dlogits is not None:
        tl.debug_barrier()  # in place, other threads' blocks are about to overwrite the target's logit
        factor = tl.where(kept, tl.load(scale), 0.0)
        for first in range(0, V, BLOCK_V):
            cols = first + block
            x = tl.load(logits + row * V + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
            p = tl.exp(x - lse) - tl.where(cols == target, 1.0, 0.0)
            # An ignored row's logits may be infinite, and 0 * NaN is NaN.
            d = tl.where(kept, p * factor, 0.0)
            tl.store(dlogits + row * V + cols, d.to(dlogits.dtype.element_ty), mask=cols < V)


# Launchers.


def _launch_rows(logits: Tensor, targets: Tensor, ignore_index: int, mean: bool, dlogits: Tensor | None) -> Tensor:
    """The loss. logits and dlogits dense."""
    V = logits.shape[-1]
    targets = targets.contiguous()
    N = targets.numel()
    count = (targets != ignore_index).sum().float()
    # The clamp keeps the zero gradient of a batch with nothing to predict.
    scale = count.clamp(min=1).reciprocal() if mean else torch.ones_like(count)
    losses = logits.new_empty(N, dtype=torch.float32)
    if N:
        interpreted = architecture(logits.device) == INTERPRETER
        shapes = [(min(256, triton.next_power_of_2(V)), 4)] if interpreted else [(4096, 8), (2048, 4)]
        launch(
            cross_entropy_kernel,
            lambda _: (N,),
            {
                "logits": logits,
                "targets": targets,
                "losses": losses,
                "dlogits": dlogits,
                "scale": scale,
                "V": V,
                "ignore_index": ignore_index,
            },
            [Config({"BLOCK_V": block}, num_warps=warps) for block, warps in shapes],
            f"{logits.dtype} {power_of_2_key(N, V)}",
        )
    loss = losses.sum(dtype=torch.float64).float()
    return loss / count if mean else loss


def launch_cross_entropy_fwd(
    logits: Tensor, targets: Tensor, ignore_index: int, mean: bool, need_dlogits: bool
) -> tuple[Tensor, Tensor]:
    logits = logits.contiguous()
    dlogits = torch.empty_like(logits) if need_dlogits else None
    loss = _launch_rows(logits, targets, ignore_index, mean, dlogits)
    return loss, logits.new_empty(0) if dlogits is None else dlogits


def launch_cross_entropy_fwd_inplace(logits: Tensor, targets: Tensor, ignore_index: int, mean: bool) -> Tensor:
    dense = logits.contiguous()
    loss = _launch_rows(dense, targets, ignore_index, mean, dense)
    if dense is not logits:
        logits.copy_(dense)
    return loss
