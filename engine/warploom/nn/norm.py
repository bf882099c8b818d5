"""LayerNorm and RMSNorm on the fused ops: torch.nn's, with the residual sum done in the same pass on request."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from warploom.ops.layer_norm import layer_norm
from warploom.ops.rms_norm import rms_norm


class Norm(nn.Module):
    """What LayerNorm and RMSNorm share: forward(x) returns the normalised x, as torch's do.

    forward(x, stream) returns (y, sum): sum is stream + x (x itself where stream is None), y the normalised sum.
    x, stream: (..., *normalized_shape), any floating dtype; the weights are cast to it. Raises ValueError where x ends
    in another shape.
    """

    normalized_shape: tuple[int, ...]
    weight: Tensor  # None without elementwise_affine

    def forward(self, x: Tensor, *stream: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        residual = stream[0] if stream else None
        if len(self.normalized_shape) == 1:
            y = self._normalise(x, residual)
        else:
            y = self._normalise_flat(x, residual)
        return (y, x) if stream and residual is None else y  # type: ignore[return-value]

    def _normalise_flat(self, x: Tensor, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        """The ops normalise over one dimension: several are made one, and one several again."""
        n, shape = len(self.normalized_shape), x.shape
        if tuple(shape[-n:]) != self.normalized_shape:
            raise ValueError(f"x must end in {self.normalized_shape} (normalized_shape), got shape {tuple(shape)}")
        if residual is None:
            return self._normalise(x.flatten(-n), None).view(shape)  # type: ignore[union-attr]
        y, stream = self._normalise(x.flatten(-n), residual.flatten(-n))
        return y.view(shape), stream.view(shape)

    def _normalise(self, x: Tensor, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _weight_for(self, x: Tensor) -> Tensor:
        """The weight as the op takes it with x: one row, ones where there is none."""
        if self.weight is None:
            return torch.ones(self.normalized_shape, dtype=x.dtype, device=x.device).flatten()
        return self.weight.to(x.dtype).flatten()


class LayerNorm(Norm, nn.LayerNorm):  # type: ignore[misc]  # forward takes a stream too
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the last dimensions; constructed as torch.nn's."""

    def _normalise(self, x: Tensor, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        bias = None if self.bias is None else self.bias.to(x.dtype).flatten()
        return layer_norm(x, self._weight_for(x), bias, self.eps, residual)


class RMSNorm(Norm, nn.RMSNorm):  # type: ignore[misc]  # forward takes a stream too
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimensions; constructed as torch.nn's.

    eps: None takes the machine epsilon of the dtype in which the sums run, float32 for 16-bit x, as torch does.
    """

    def _normalise(self, x: Tensor, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        return rms_norm(x, self._weight_for(x), epsilon(self.eps, x.dtype), residual)


def epsilon(eps: float | None, dtype: torch.dtype) -> float:
    """Return what torch.nn.RMSNorm adds to the mean square of x of this dtype."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps if eps is None else eps
