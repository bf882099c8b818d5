"""The blocks a stack is made of, and the tables that turn a configuration into modules.

A block maps (x, stream) to (x, stream). In pre-norm blocks, stream is the residual stream and x what the sub-layer
before has yet to add to it: the sum is left to the next norm, which does it in the same pass over memory. Post-norm
blocks have nothing to carry: their x is the normalised stream itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn as nn
from torch import Tensor

from warploom.models.config import TransformerConfig
from warploom.models.recompute import Recomputable
from warploom.nn.attention import AttentionContext, CrossAttention, SelfAttention
from warploom.nn.feed_forward import GEGLU, FeedForward, SwiGLU
from warploom.nn.norm import LayerNorm, RMSNorm
from warploom.nn.position import (
    AlibiPosition,
    BucketPosition,
    LearnedPosition,
    NoPosition,
    RotaryPosition,
    SinusoidalPosition,
)

NORMS: dict[str, Callable[[TransformerConfig], nn.Module]] = {
    "layer_norm": lambda config: LayerNorm(config.d_model, config.norm_eps, bias=config.norm_bias),
    "rms_norm": lambda config: RMSNorm(config.d_model, config.norm_eps),
}
FEED_FORWARDS: dict[str, Callable[..., nn.Module]] = {
    **{name: partial(FeedForward, activation=name) for name in ("relu", "relu2", "gelu", "gelu_tanh", "silu")},
    "swiglu": SwiGLU,
    "geglu": GEGLU,
}
# (config, whether the stack is causal) -> the positions of one stack, which all of its layers share.
POSITIONS: dict[str, Callable[[TransformerConfig, bool], NoPosition]] = {
    "sinusoidal": lambda config, causal: SinusoidalPosition(config.d_model),
    "learned": lambda config, causal: LearnedPosition(config.max_seq_len, config.d_model),
    "rotary": lambda config, causal: RotaryPosition(config.rotary_base),
    "alibi": lambda config, causal: AlibiPosition(config.num_heads),
    "t5": lambda config, causal: BucketPosition(config.num_heads, bidirectional=not causal),
    "none": lambda config, causal: NoPosition(),
}


def _norm(config: TransformerConfig) -> nn.Module:
    return NORMS[config.norm](config)


def _attention(kind: type[SelfAttention] | type[CrossAttention], config: TransformerConfig, layer: int) -> nn.Module:
    return kind(config.d_model, config.num_heads, config.kv_heads, config.head_width, config.bias, layer)


class _Block(Recomputable):
    """The parts every block has. layer, its number in the stack, is what its cache entries go by."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = _attention(SelfAttention, config, layer)
        self.feed_forward = FEED_FORWARDS[config.activation](config.d_model, config.ff_width, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)


class _TwoNormBlock(_Block):
    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.feed_forward_norm = _norm(config)


class _CrossBlock(_TwoNormBlock):
    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.cross_attention_norm = _norm(config)
        self.cross_attention = _attention(CrossAttention, config, layer)


class PreNormBlock(_TwoNormBlock):
    """x += attention(norm(x)); x += feed_forward(norm(x))."""

    def forward(self, x: Tensor, stream: Tensor | None, context: AttentionContext) -> tuple[Tensor, Tensor | None]:
        y, stream = self.attention_norm(x, stream)
        x = self.dropout(self.attention(y, context))
        y, stream = self.feed_forward_norm(x, stream)
        return self.dropout(self.feed_forward(y)), stream


class PostNormBlock(_TwoNormBlock):
    """x = norm(x + attention(x)); x = norm(x + feed_forward(x))."""

    def forward(self, x: Tensor, stream: Tensor | None, context: AttentionContext) -> tuple[Tensor, Tensor | None]:
        x, _ = self.attention_norm(self.dropout(self.attention(x, context)), x)
        x, _ = self.feed_forward_norm(self.dropout(self.feed_forward(x)), x)
        return x, None


class PreNormCrossBlock(_CrossBlock):
    """As PreNormBlock, with attention to the encoded source between the two."""

    def forward(self, x: Tensor, stream: Tensor | None, context: AttentionContext) -> tuple[Tensor, Tensor | None]:
        y, stream = self.attention_norm(x, stream)
        x = self.dropout(self.attention(y, context))
        y, stream = self.cross_attention_norm(x, stream)
        x = self.dropout(self.cross_attention(y, context))
        y, stream = self.feed_forward_norm(x, stream)
        return self.dropout(self.feed_forward(y)), stream


class PostNormCrossBlock(_CrossBlock):
    """As PostNormBlock, with attention to the encoded source between the two."""

    def forward(self, x: Tensor, stream: Tensor | None, context: AttentionContext) -> tuple[Tensor, Tensor | None]:
        x, _ = self.attention_norm(self.dropout(self.attention(x, context)), x)
        x, _ = self.cross_attention_norm(self.dropout(self.cross_attention(x, context)), x)
        x, _ = self.feed_forward_norm(self.dropout(self.feed_forward(x)), x)
        return x, None


class ParallelBlock(_TwoNormBlock):
    """x += attention(norm(x)) + feed_forward(norm'(x)): Falcon with a norm for each branch (180B)."""

    def forward(self, x: Tensor, stream: Tensor | None, context: AttentionContext) -> tuple[Tensor, Tensor | None]:
        y, stream = self.attention_norm(x, stream)
        z = self.feed_forward_norm(stream)
        return self.dropout(self.attention(y, context)) + self.dropout(self.feed_forward(z)), stream


class SharedNormParallelBlock(_Block):
    """x += attention(y) + feed_forward(y), y = norm(x): Falcon with one norm for both branches (7B)."""

    def forward(self, x: Tensor, stream: Tensor | None, context: AttentionContext) -> tuple[Tensor, Tensor | None]:
        y, stream = self.attention_norm(x, stream)
        return self.dropout(self.attention(y, context)) + self.dropout(self.feed_forward(y)), stream


class NoNorm(nn.Module):
    """Stands where others have a norm: at the end of a post-norm stack, whose last block has normalised its output
    already, and between embedding and blocks."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x, x


# (norm_position, whether the block reads an encoded source) -> block
BLOCKS: dict[tuple[str, bool], type[_Block]] = {
    ("pre", False): PreNormBlock,
    ("pre", True): PreNormCrossBlock,
    ("post", False): PostNormBlock,
    ("post", True): PostNormCrossBlock,
}
PARALLEL_BLOCKS: dict[int, type[_Block]] = {1: SharedNormParallelBlock, 2: ParallelBlock}
EMBEDDING_NORMS: dict[bool, Callable[[TransformerConfig], nn.Module]] = {True: _norm, False: lambda config: NoNorm()}
FINAL_NORMS: dict[str, Callable[[TransformerConfig], nn.Module]] = {"pre": _norm, "post": lambda config: NoNorm()}


def build_block(config: TransformerConfig, layer: int, cross: bool) -> _Block:
    """Return block number layer of a stack; cross: it reads an encoded source."""
    kind = PARALLEL_BLOCKS[config.parallel_norms] if config.parallel_block else BLOCKS[config.norm_position, cross]
    return kind(config, layer)
