"""The feed-forward layer: widen to F features, apply an activation, come back to C."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from warploom.nn.linear import Linear
from warploom.ops.linear_relu import linear_relu

Expansion = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _linear_relu2(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear_relu(x, weight, bias).square()


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


EXPANSIONS: dict[str, Expansion] = {
    "relu": linear_relu,
    "relu2": _linear_relu2,
    "gelu": partial(_linear_gelu, approximate="none"),
    "gelu_tanh": partial(_linear_gelu, approximate="tanh"),
}


class FeedForward(nn.Module):
    """y = down_proj(activation(up_proj(x))). x, y: (..., C). activation: a key of EXPANSIONS."""

    def __init__(self, d_model: int, d_ff: int, activation: str = "relu", bias: bool = True) -> None:
        super().__init__()
        self.expand = EXPANSIONS[activation]
        self.up_proj = Linear(d_model, d_ff, bias)
        self.down_proj = Linear(d_ff, d_model, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.expand(x, *self.up_proj.parameters_in(x)))


class SwiGLU(nn.Module):
    """y = down_proj(silu(gate_proj(x)) * up_proj(x)) (Shazeer, 2020). x, y: (..., C)."""

    def __init__(self, d_model: int, d_ff: int, bias: bool = True) -> None:
        super().__init__()
        self.gate_proj = Linear(d_model, d_ff, bias)
        self.up_proj = Linear(d_model, d_ff, bias)
        self.down_proj = Linear(d_ff, d_model, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
