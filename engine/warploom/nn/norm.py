"""LayerNorm and RMSNorm on the fused ops, with the residual sum done in the same pass."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from warploom.ops.layer_norm import layer_norm
from warploom.ops.rms_norm import rms_norm


class Norm(nn.Module):
    """What LayerNorm and RMSNorm share: forward(x, residual=None).

    x, residual: (..., C), any floating dtype; the weights are cast to it. Returns (y, stream) of x's shape and dtype:
    stream is residual + x (x itself without a residual), y the normalised stream.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LayerNorm(Norm):
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the last dimension."""

    def __init__(self, dim: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__(dim, eps)
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = layer_norm(x, self.weight.to(x.dtype), bias, self.eps, residual)
        return (y, x) if residual is None else y  # type: ignore[return-value]


class RMSNorm(Norm):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = rms_norm(x, self.weight.to(x.dtype), self.eps, residual)
        return (y, x) if residual is None else y  # type: ignore[return-value]
