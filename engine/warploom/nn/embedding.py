"""Embedding: torch.nn.Embedding on the op, with a constant scale."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from warploom.ops.embedding import add_embedding_gradient, embedding


class Embedding(nn.Embedding):
    """y = weight[tokens] * scale. tokens: (...) integers; y: (..., C) in the weight's dtype, to be cast by the caller
    once positions are added.

    Constructed as torch.nn's, scale aside. Raises ValueError for max_norm, scale_grad_by_freq and sparse, which the op
    does not have.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,  # these two are what torch's from_pretrained passes
        _freeze: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scale: float = 1.0,
    ) -> None:
        unserved = {"max_norm": max_norm, "scale_grad_by_freq": scale_grad_by_freq, "sparse": sparse}
        for name, value in unserved.items():
            if value is not None and value is not False:
                raise ValueError(
                    f"{name} must be left out, got {value!r}: torch.nn.Embedding does it, this one does not"
                )
        super().__init__(
            *(num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse),
            *(_weight, _freeze, device, dtype),
        )
        self.scale = scale

    def forward(self, tokens: Tensor) -> Tensor:
        return self._finished(tokens, embedding(tokens, self.weight))

    def with_weight(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return forward(tokens) and the weight, for an output layer that shares it and its gradient's memory.

        The weight must be used once, by an op whose gradient of it is a tensor of its own: the embedding's gradient is
        added into that one, where autograd would make a second of (num_embeddings, embedding_dim) to add.
        """
        weight = self.weight
        if torch.compiler.is_compiling():
            return self(tokens), weight
        embedded, weight = _EmbeddingAndWeight.apply(weight, tokens)
        return self._finished(tokens, embedded), weight

    def _finished(self, tokens: Tensor, embedded: Tensor) -> Tensor:
        if self.padding_idx is not None:  # these rows keep their values and pass no gradient on
            embedded = torch.where((tokens == self.padding_idx)[..., None], embedded.detach(), embedded)
        return embedded if self.scale == 1.0 else embedded * self.scale


class _EmbeddingAndWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(tokens)
        ctx.set_materialize_grads(False)
        ctx.num_embeddings = weight.shape[0]
        return torch.ops.warploom.embedding_fwd.default(weight, tokens), weight.view_as(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_embedded: Tensor | None, d_weight: Tensor | None) -> tuple[Tensor | None, None]:
        (tokens,) = ctx.saved_tensors
        if d_embedded is not None:
            rows = d_embedded.reshape(-1, d_embedded.shape[-1])
            if d_weight is None:
                d_weight = rows.new_zeros(ctx.num_embeddings, rows.shape[-1])
            add_embedding_gradient(d_embedded, tokens, d_weight)
        return d_weight, None
