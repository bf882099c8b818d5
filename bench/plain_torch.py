"""The model of bench.step in plain torch, as a careful user writes it today: torch.nn layers, fused query-key-value
projection, F.scaled_dot_product_attention, autocast for bf16. It takes the weights of a warploom Transformer, so that
both must report the same loss before either is timed."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from warploom.models.config import TransformerConfig
from warploom.models.transformer import Transformer

ACTIVATIONS = {"relu": F.relu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


class Block(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        C, bias = config.d_model, config.bias
        self.num_heads = config.num_heads
        self.attention_norm = nn.LayerNorm(C, config.norm_eps)
        self.qkv_proj = nn.Linear(C, 3 * C, bias)
        self.o_proj = nn.Linear(C, C, bias)
        self.feed_forward_norm = nn.LayerNorm(C, config.norm_eps)
        self.up_proj = nn.Linear(C, config.ff_width, bias)
        self.down_proj = nn.Linear(config.ff_width, C, bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv_proj(self.attention_norm(x)).view(B, T, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(o.transpose(1, 2).reshape(B, T, C))
        return x + self.down_proj(self.activation(self.up_proj(self.feed_forward_norm(x))))


class PlainTransformer(nn.Module):
    """Decoder-only, pre-norm LayerNorm, learned positions, tied embeddings: the forms that bench.step times."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position = nn.Embedding(config.max_seq_len, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.d_model, config.norm_eps)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def plain_copy(model: Transformer) -> PlainTransformer:
    """Build the same model in plain torch, with copies of the same weights."""
    plain = PlainTransformer(model.config)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    renamed = {}
    for name, value in state.items():
        name = name.removeprefix("stack.").replace("position.table", "position")
        for part in ("attention.", "feed_forward."):
            name = name.replace("." + part, ".")
        if ".q_proj." in name:
            parts = [value, *(state["stack." + name.replace(".q_proj.", f".attention.{p}_proj.")] for p in "kv")]
            renamed[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            renamed[name] = value
    plain.load_state_dict(renamed)
    return plain
