"""The feed-forward layer: widen to F features, apply an activation, come back to C."""

from __future__ import annotations

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from warploom.nn.linear import Linear
from warploom.ops.linear import ACTIVATIONS as FUSED_ACTIVATIONS


class FeedForward(nn.Module):
    """y = down_proj(activation(up_proj(x))). x, y: (..., C). activation: a key of FUSED_ACTIVATIONS, or "gelu"."""

    def __init__(self, d_model: int, d_ff: int, activation: str = "relu", bias: bool = True) -> None:
        super().__init__()
        fused = activation in FUSED_ACTIVATIONS
        self.up_proj = Linear(d_model, d_ff, bias, activation=activation if fused else "none")
        self.activation = nn.Identity() if fused else nn.GELU()
        self.down_proj = Linear(d_ff, d_model, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))


class _Gated(nn.Module):
    def __init__(self, d_model: int, d_ff: int, bias: bool = True) -> None:
        super().__init__()
        self.gate_proj = Linear(d_model, d_ff, bias)
        self.up_proj = Linear(d_model, d_ff, bias)
        self.down_proj = Linear(d_ff, d_model, bias)


class SwiGLU(_Gated):
    """y = down_proj(silu(gate_proj(x)) * up_proj(x)) (Shazeer, 2020). x, y: (..., C)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GEGLU(_Gated):
    """y = down_proj(gelu(gate_proj(x)) * up_proj(x)) with the tanh approximation, as in T5 1.1. x, y: (..., C)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))
