"""LayerNorm and RMSNorm on the fused ops: torch.nn's, with the residual sum done in the same pass on request."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from warploom.ops.layer_norm import layer_norm
from warploom.ops.rms_norm import rms_norm


class Norm(nn.Module):
    """What LayerNorm and RMSNorm share: forward(x) returns the normalised x, as torch's do.

    forward(x, stream) returns (y, sum): sum is stream + x (x itself where stream is None), y the normalised sum.
    x, stream: (..., C), any floating dtype; the weights are cast to it.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        if len(shape) != 1:
            raise ValueError(f"normalized_shape must be one dimension, the last, got {shape}")
        self.normalized_shape = shape
        self.weight = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))

    def forward(self, x: Tensor, *stream: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        if not stream:
            return self._normalise(x, None)
        (residual,) = stream
        return (self._normalise(x, None), x) if residual is None else self._normalise(x, residual)

    def _normalise(self, x: Tensor, residual: Tensor | None) -> Tensor:
        raise NotImplementedError


class LayerNorm(Norm):
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the last dimension."""

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, device, dtype)
        self.eps = eps
        self.bias = nn.Parameter(torch.zeros_like(self.weight)) if bias else None

    def _normalise(self, x: Tensor, residual: Tensor | None) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return layer_norm(x, self.weight.to(x.dtype), bias, self.eps, residual)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, bias={self.bias is not None}"


class RMSNorm(Norm):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension. eps: None takes x's machine epsilon, as torch."""

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, device, dtype)
        self.eps = eps

    def _normalise(self, x: Tensor, residual: Tensor | None) -> Tensor:
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return rms_norm(x, self.weight.to(x.dtype), eps, residual)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}"
