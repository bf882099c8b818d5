"""The feed-forward layer: widen to F features, apply an activation, come back to C."""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from warploom.nn.linear import Linear
from warploom.ops.linear import ACTIVATIONS
from warploom.ops.linear_glu import linear_glu


class FeedForward(nn.Module):
    """y = down_proj(activation(up_proj(x))). x, y: (..., C). activation: a key of ops.linear.ACTIVATIONS."""

    def __init__(self, d_model: int, d_ff: int, activation: str = "relu", bias: bool = True) -> None:
        super().__init__()
        self.up_proj = Linear(d_model, d_ff, bias, activation=activation)
        self.down_proj = Linear(d_ff, d_model, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x))


class _Gated(nn.Module):
    gate: str

    def __init__(self, d_model: int, d_ff: int, bias: bool = True) -> None:
        super().__init__()
        self.gate_proj = Linear(d_model, d_ff, bias)
        self.up_proj = Linear(d_model, d_ff, bias)
        self.down_proj = Linear(d_ff, d_model, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self._widen(x))

    def _widen(self, x: Tensor) -> Tensor:
        parts = (self.gate_proj, self.up_proj)
        if any(type(part) is not Linear for part in parts):  # something else was put in their place
            return ACTIVATIONS[self.gate](self.gate_proj(x)) * self.up_proj(x)
        (gate_weight, gate_bias), (up_weight, up_bias) = (part.parameters_for(x) for part in parts)
        packed = [part.packed for part in parts]
        return linear_glu(x, gate_weight, up_weight, gate_bias, up_bias, self.gate, packed)


class SwiGLU(_Gated):
    """y = down_proj(silu(gate_proj(x)) * up_proj(x)) (Shazeer, 2020). x, y: (..., C)."""

    gate = "silu"


class GEGLU(_Gated):
    """y = down_proj(gelu(gate_proj(x)) * up_proj(x)) with the tanh approximation, as in T5 1.1. x, y: (..., C)."""

    gate = "gelu_tanh"
