"""MultiheadAttention: torch.nn's, on the ops for products and attention. patch gives torch's modules this forward."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from warploom.nn.autocast import dense
from warploom.nn.masked_attention import attend


class MultiheadAttention(nn.MultiheadAttention):
    """Constructed, called and saved as torch.nn.MultiheadAttention, whose subclass it is.

    forward is torch's own, and as slow, where it must make the attention probabilities that the op never has in memory:
    with need_weights=True (torch's default outside of its Transformer layers) and with dropout while training. So it is
    with add_bias_kv, add_zero_attn and nested tensors, and for arguments that do not fit, which torch's errors name.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if need_weights or not self._has_op(query, key, value, key_padding_mask, attn_mask, is_causal):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        is_batched = query.dim() == 3
        # (B, T, C)
        q, k, v = self._projected(query, key, value)
        if not is_batched:
            q, k, v = q[None], k[None], v[None]
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        B, T, S = q.shape[0], q.shape[1], k.shape[1]
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        causal = is_causal and key_padding_mask is None and T == S
        masks = []
        if attn_mask is not None and not causal:
            masks.append(_visible(attn_mask.view(-1, self.num_heads if attn_mask.dim() == 3 else 1, T, S)))
        if key_padding_mask is not None:
            masks.append(_visible(key_padding_mask.view(B, 1, 1, S)))
        o = attend(q, k, v, masks, causal=causal).transpose(1, 2).flatten(2)  # (B, T, C)
        if not is_batched:
            o = o[0]
        elif not self.batch_first:
            o = o.transpose(0, 1)
        return dense(o, self.out_proj.weight, self.out_proj.bias), None

    def _has_op(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> bool:
        if (self.training and self.dropout > 0) or self.bias_k is not None or self.add_zero_attn:
            return False
        if query.is_nested or key.is_nested or value.is_nested or (is_causal and attn_mask is None):
            return False
        if query.dim() not in (2, 3) or query.dim() != key.dim() or key.shape[:-1] != value.shape[:-1]:
            return False
        batch: tuple[int, ...] = ()
        T, S = query.shape[0], key.shape[0]
        if query.dim() == 3:
            at = 0 if self.batch_first else 1
            batch, T, S = (query.shape[at],), query.shape[1 - at], key.shape[1 - at]
            if key.shape[at] != query.shape[at]:
                return False
        heads = (batch[0] if batch else 1) * self.num_heads
        return _fits(key_padding_mask, [(*batch, S)]) and _fits(attn_mask, [(T, S), (heads, T, S)])

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        bias = self.in_proj_bias
        weights: tuple[Tensor, ...]
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return dense(query, self.in_proj_weight, bias).chunk(3, -1)
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(dense(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))


def _fits(mask: Tensor | None, shapes: list[tuple[int, ...]]) -> bool:
    """A mask of another shape with as many elements would be read wrongly, one of integers taken for scores."""
    return mask is None or (tuple(mask.shape) in shapes and (mask.dtype == torch.bool or mask.is_floating_point()))


def _visible(mask: Tensor) -> Tensor:
    """torch.nn's bool masks say which keys are hidden."""
    return ~mask if mask.dtype == torch.bool else mask
