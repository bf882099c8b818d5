"""Modules on the ops, by torch.nn's names. Each works alone: float32 weights, activations in any floating dtype."""

from warploom.nn.attention import AttentionCache, AttentionContext, CrossAttention, SelfAttention
from warploom.nn.embedding import Embedding
from warploom.nn.feed_forward import GEGLU, FeedForward, SwiGLU
from warploom.nn.linear import Linear
from warploom.nn.multihead_attention import MultiheadAttention
from warploom.nn.norm import LayerNorm, RMSNorm

__all__ = [
    "GEGLU",
    "AttentionCache",
    "AttentionContext",
    "CrossAttention",
    "Embedding",
    "FeedForward",
    "LayerNorm",
    "Linear",
    "MultiheadAttention",
    "RMSNorm",
    "SelfAttention",
    "SwiGLU",
]
