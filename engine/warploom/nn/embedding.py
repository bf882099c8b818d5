"""Embedding: torch.nn.Embedding with a constant scale."""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor


class Embedding(nn.Embedding):
    """y = weight[tokens] * scale. tokens: (...) integers; y: (..., C) in the weight's dtype, to be cast by the caller
    once positions are added."""

    def __init__(self, num_embeddings: int, embedding_dim: int, scale: float = 1.0) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.scale = scale

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = super().forward(tokens)
        return embedded if self.scale == 1.0 else embedded * self.scale
