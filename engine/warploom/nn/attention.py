"""Self-attention and cross-attention on the fused op, and the protocol of the key/value cache they write to.

Dropout acts on the output of the attention layer (in the block), never on the attention probabilities: those exist
only inside the fused op, a tile at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn as nn
from torch import Tensor

from warploom.nn.linear import Linear
from warploom.nn.lora import LoRALinear
from warploom.ops.attention import attention
from warploom.ops.linear_qkv import linear_qkv


class AttentionCache(Protocol):
    """Keys and values of the tokens that a decoder has already read, per layer.

    Rows may hold different numbers of tokens; each row's keys are packed to the left, and what follows a row's last
    key is never seen thanks to the key lengths. One token is then read with causal=False (it sees every key of its
    row). Several tokens are read with the causal mask aligned to the last key, which is right if every row already
    holds equally many keys, none for instance: the tokens of a prompt, with padding to the right.
    """

    cross: dict[int, tuple[Tensor, Tensor]]
    """Layer -> keys and values of the encoded source, (B, H_kv, S, D): filled by the layer's first call, then read."""

    def num_keys(self, num_new: int) -> int:
        """Return how many keys S update() will return once num_new tokens are appended to every row."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append k, v (B, H_kv, T, D) of the T new tokens. Return all keys and values (B, H_kv, S, D), and how many of
        the S each row holds, (B,) integers, or None if every row holds all."""


@dataclass(frozen=True)
class AttentionContext:
    """What a stack tells all of its attention layers about one batch."""

    positions: Tensor  # (T,) or, where rows differ, (B, T) int64
    rotate: Callable[[Tensor, Tensor], Tensor]  # (B, H, T, D), positions -> (B, H, T, D)
    causal: bool
    bias: Tensor | None = None  # as ops.attention has it, or (B, H, T, S) where positions differ by row
    cu_seqlens: Tensor | None = None  # (number of documents + 1,) int32
    key_lengths: Tensor | None = None  # (B,) integers
    cache: AttentionCache | None = None
    memory: Tensor | None = None  # (B, S, C), the encoded source
    memory_lengths: Tensor | None = None  # (B,) integers


class _Attention(nn.Module):
    """The four projections; the heads of q, k and v are consecutive groups of head_dim rows of their weights.

    attend: ops.attention, or what exchanges its arguments with other processes around it.
    """

    attend: Callable[..., Tensor] = staticmethod(attention)

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        layer: int = 0,
    ) -> None:
        super().__init__()
        self.head_dim = d_model // num_heads if head_dim is None else head_dim
        self.layer = layer
        kv_width = (num_heads if num_kv_heads is None else num_kv_heads) * self.head_dim
        self.q_proj = Linear(d_model, num_heads * self.head_dim, bias)
        self.k_proj = Linear(d_model, kv_width, bias)
        self.v_proj = Linear(d_model, kv_width, bias)
        self.o_proj = Linear(num_heads * self.head_dim, d_model, bias)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, T, H * D) -> (B, H, T, D)

    def _output(self, o: Tensor) -> Tensor:
        return self.o_proj(o.transpose(1, 2).flatten(2))  # (B, H, T, D) -> (B, T, C)


class SelfAttention(_Attention):
    """Multi-head attention of a sequence to itself: multi-query with num_kv_heads=1, grouped-query in between.

    head_dim: d_model / num_heads if None. layer: the number under which the cache keeps keys and values.
    """

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = (self.q_proj, self.k_proj, self.v_proj)
        if any(type(part) not in (Linear, LoRALinear) for part in parts):  # something else was put in their place
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        (q_weight, q_bias), (k_weight, k_bias), (v_weight, v_bias) = (part.parameters_for(x) for part in parts)
        packed = [part.packed for part in parts]
        q, k, v = linear_qkv(x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, packed)
        q, k, v = (p.adapt(y, x) if isinstance(p, LoRALinear) else y for p, y in zip(parts, (q, k, v), strict=True))
        return q, k, v

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """x: (B, T, C), any floating dtype; returns the same. Packed documents come as B == 1 with cu_seqlens."""
        q, k, v = map(self._heads, self._project(x))
        q, k = context.rotate(q, context.positions), context.rotate(k, context.positions)
        key_lengths = context.key_lengths
        if context.cache is not None:
            k, v, key_lengths = context.cache.update(self.layer, k, v)
        if context.bias is not None and context.bias.dim() == 4:
            o = _attention_by_row(q, k, v, context.bias, key_lengths, context.causal)
        else:
            o = self.attend(
                *(q, k, v),
                causal=context.causal,
                bias=context.bias,
                cu_seqlens=context.cu_seqlens,
                key_lengths=key_lengths,
            )
        return self._output(o)


def _attention_by_row(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, key_lengths: Tensor | None, causal: bool
) -> Tensor:
    """Attend row by row: the op's bias is one for the whole batch, which a batch of unequal positions cannot share.
    Only decoding with distance biases (ALiBi, T5) and unequal prompts comes here."""
    rows = (slice(b, b + 1) for b in range(q.shape[0]))
    return torch.cat(
        [
            attention(
                *(q[b], k[b], v[b]),
                causal=causal,
                bias=bias[b].squeeze(0),
                key_lengths=None if key_lengths is None else key_lengths[b],
            )
            for b in rows
        ]
    )


class CrossAttention(_Attention):
    """Attention of a sequence to the encoded source; constructed as SelfAttention is."""

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """x: (B, T, C), any floating dtype; returns the same. context.memory: (B, S, C) of x's dtype."""
        k, v = self._memory_heads(context)
        return self._output(self.attend(self._heads(self.q_proj(x)), k, v, key_lengths=context.memory_lengths))

    def _memory_heads(self, context: AttentionContext) -> tuple[Tensor, Tensor]:
        if context.cache is not None and self.layer in context.cache.cross:
            return context.cache.cross[self.layer]
        k, v = self._heads(self.k_proj(context.memory)), self._heads(self.v_proj(context.memory))
        if context.cache is not None:
            context.cache.cross[self.layer] = (k, v)
        return k, v
