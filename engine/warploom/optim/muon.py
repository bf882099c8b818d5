"""Muon (Jordan et al., 2024) with the update size of Moonlight (Liu et al., 2025): momentum, made orthogonal.

torch.optim.Muon takes one matrix at a time and always in bfloat16. Here matrices of one shape go through the iteration
as a batch, and the dtype is the caller's: bfloat16 products are emulated, and slow, on processors without them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

# Jordan's quintic: steepest at 0, so that five steps bring singular values from 1e-3 up into about 0.7 to 1.2.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_NUM_ITERATIONS = 5


class Muon(Optimizer):
    """Nesterov momentum whose update is the nearest (semi-)orthogonal matrix, with decoupled weight decay.

    params: matrices (2-D). The update's root mean square is 0.2, AdamW's usual one, whatever the matrix's shape, so
    that one learning rate serves all. Its products run in dtype. Raises ValueError for a parameter that is not 2-D.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._dtype = dtype
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() != 2:
                    raise ValueError(f"params must be matrices, got one of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None, *, grad_factor: float = 1.0) -> None:  # type: ignore[override]
        """Make one step, as if every gradient were grad_factor times what it is. The gradients keep their values."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(tuple(p.shape), []).append(p)
            for params in by_shape.values():
                self._step_same_shape(params, grad_factor, group["lr"], group["momentum"], group["weight_decay"])

    def _step_same_shape(
        self, params: list[Tensor], grad_factor: float, lr: float, momentum: float, weight_decay: float
    ) -> None:
        updates = []
        for p in params:
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            assert p.grad is not None
            grad = p.grad if grad_factor == 1.0 else p.grad * grad_factor
            buffer = state["momentum_buffer"].lerp_(grad, 1 - momentum)
            updates.append(grad.lerp(buffer, momentum))
        rows, columns = params[0].shape
        # An orthogonal (rows, columns) matrix has root mean square 1 / sqrt(max(rows, columns)).
        step_size = 0.2 * max(rows, columns) ** 0.5 * lr
        for p, update in zip(params, orthogonalize(torch.stack(updates), self._dtype), strict=True):
            p.mul_(1 - lr * weight_decay).add_(update, alpha=-step_size)


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bring the singular values of each matrix near 1 by five Newton-Schulz iterations in dtype.

    matrices: (..., M, N), returned in the same shape and dtype. A matrix of zeros stays zero.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT  # (..., short, long): the smaller Gram matrix
    # The Frobenius norm bounds the largest singular value, which the iteration needs to be at most 1.
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(_NUM_ITERATIONS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)
