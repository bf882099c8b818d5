"""Products in the dtypes that torch.autocast gives those of torch.nn, for modules that must behave as torch.nn's do."""

from __future__ import annotations

import torch
from torch import Tensor

from warploom.ops.linear import linear


def autocast(x: Tensor) -> Tensor:
    """Return x as torch's autocast hands it to a product: in its dtype where it is on, x itself where it is not."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def dense(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """Return activation(x weight^T + bias) as F.linear and the activation do, inside autocast and outside."""
    x = autocast(x)
    if weight.dtype != torch.float32:  # the op rounds float32 weights itself, and returns their gradient unrounded
        weight, bias = autocast(weight), None if bias is None else autocast(bias)
    return linear(x, weight, bias, activation)
