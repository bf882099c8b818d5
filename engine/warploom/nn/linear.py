"""Linear: torch.nn.Linear whose float32 master weight is rounded to the activation's dtype at each use.

So the compute dtype is the dtype of the activations and nothing else: no autocast, no second copy of the model.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from warploom.ops.linear import PackedWeight, linear


class Linear(nn.Linear):
    """y = activation(x weight^T + bias). x: (..., in_features), any floating dtype; y: (..., out_features) of it.

    activation: a key of ops.linear.ACTIVATIONS. packed: what products read of the weight, kept between calls; see
    keep_packed.
    """

    packed: PackedWeight | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "none",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, *self.parameters_for(x), self.activation, self.packed)

    def parameters_for(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return parameters_for(x, self.weight, self.bias)


def parameters_for(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias in a dtype that the op takes with x: as they are where that is one."""
    if weight.dtype == x.dtype or (weight.dtype == torch.float32 and x.dtype != torch.float64):
        return weight, bias
    return weight.to(x.dtype), None if bias is None else bias.to(x.dtype)


def keep_packed(model: nn.Module) -> dict[Tensor, PackedWeight]:
    """Let every Linear of the model keep its weight packed between updates, at the cost of its size in 16 bits.
    Returns what keeps each weight, for optimizers that pack what they update (optim.AdamW).

    For training loops: it saves packing the weight for each micro batch and each backward. PackedWeight says which
    writes to a weight it notices.
    """
    packed: dict[Tensor, PackedWeight] = {}
    for module in model.modules():
        if isinstance(module, Linear):
            packed[module.weight] = module.packed = PackedWeight()
    return packed
