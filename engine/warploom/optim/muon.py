"""Muon (Jordan et al., 2024) with the update size of Moonlight (Liu et al., 2025): momentum, made orthogonal.

torch.optim.Muon takes one matrix at a time and always in bfloat16. Here matrices of one shape go through the iteration
as a batch, and the dtype is the caller's: bfloat16 products are emulated, and slow, on processors without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from warploom.ops.newton_schulz import newton_schulz
from warploom.optim.eager import EagerMethods
from warploom.optim.parts import local_part


class MatrixExchange(Protocol):
    """Matrices that lie in parts on several processes."""

    def whole_shape(self, param: Tensor) -> tuple[int, ...]: ...
    def apply(self, function: Callable[[Tensor], Tensor], params: list[Tensor], parts: list[Tensor]) -> list[Tensor]:
        """Return this process's parts of function(matrices), (K, M, N) to (K, M, N); parts: its parts of matrices that
        lie as params do and have one whole shape. Every process calls with the same params, in the same order."""


class Muon(EagerMethods, Optimizer):
    """Nesterov momentum whose update is the nearest (semi-)orthogonal matrix, with decoupled weight decay.

    params: matrices (2-D). The update's root mean square is 0.2, AdamW's usual one, whatever the matrix's shape, so
    that one learning rate serves all. Its products run in dtype. exchange: for matrices that lie in parts on several
    processes. Raises ValueError for a parameter that is not 2-D.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        dtype: torch.dtype = torch.float32,
        exchange: MatrixExchange | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._dtype, self._exchange = dtype, exchange
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() != 2:
                    raise ValueError(f"params must be matrices, got one of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None, *, grad_factor: float = 1.0) -> None:  # type: ignore[override]
        """Make one step, as if every gradient were grad_factor times what it is. The gradients keep their values."""
        for group in self.param_groups:
            alike: dict[tuple[tuple[int, ...], torch.device], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((self._shape(p), p.device), []).append(p)
            for (shape, _), params in alike.items():
                self._step_same_shape(shape, params, grad_factor, group["lr"], group["momentum"], group["weight_decay"])

    def _step_same_shape(
        self,
        shape: tuple[int, ...],
        params: list[Tensor],
        grad_factor: float,
        lr: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        updates = []
        for p in params:
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(local_part(p))
            assert p.grad is not None
            grad = local_part(p.grad)
            grad = grad if grad_factor == 1.0 else grad * grad_factor
            buffer = state["momentum_buffer"].lerp_(grad, 1 - momentum)
            updates.append(grad.lerp(buffer, momentum))
        # An orthogonal (rows, columns) matrix has root mean square 1 / sqrt(max(rows, columns)).
        step_size = 0.2 * max(shape) ** 0.5 * lr
        function = partial(newton_schulz, dtype=self._dtype)
        if self._exchange is None:
            directions = list(function(torch.stack(updates)))
        else:
            directions = self._exchange.apply(function, params, updates)
        for p, direction in zip(params, directions, strict=True):
            local_part(p).mul_(1 - lr * weight_decay).add_(direction, alpha=-step_size)

    def _shape(self, param: Tensor) -> tuple[int, ...]:
        return tuple(param.shape) if self._exchange is None else self._exchange.whole_shape(param)
