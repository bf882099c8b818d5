"""Linear: torch.nn.Linear whose float32 master weight is cast to the activation's dtype at each use.

So the compute dtype is the dtype of the activations and nothing else: no autocast, no second copy of the model.
"""

from __future__ import annotations

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Linear(nn.Linear):
    """y = x weight^T + bias. x: (..., in_features), any floating dtype; y: (..., out_features) in x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.parameters_in(x))

    def parameters_in(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias in x's dtype."""
        return self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
