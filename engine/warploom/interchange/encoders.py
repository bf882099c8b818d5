"""Encoder families: BERT, with sentence encoders such as all-MiniLM-L6-v2 among them."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from warploom.interchange.family import THEIR_ACTIVATIONS, Family, Settings, layers, parts, require_fields
from warploom.interchange.mapping import Entry, same
from warploom.models.config import TransformerConfig

_TOKEN_TYPES = 2


def _read_bert(settings: Settings) -> dict[str, Any]:
    settings.require("position_embedding_type", "absolute", "absolute")
    settings.require("is_decoder", False, False)
    return dict(
        architecture="encoder",
        vocab_size=settings.number("vocab_size", 30522),
        max_seq_len=settings.number("max_position_embeddings", 512),
        d_model=settings.number("hidden_size", 768),
        num_layers=settings.number("num_hidden_layers", 12),
        num_heads=settings.number("num_attention_heads", 12),
        d_ff=settings.number("intermediate_size", 3072),
        activation=settings.activation("hidden_act", "gelu"),
        norm_eps=settings.real("layer_norm_eps", 1e-12),
        position="learned",
        norm_position="post",
        embedding_norm=True,
        bias=True,
    )


def _write_bert(config: TransformerConfig) -> dict[str, Any]:
    require_fields(
        config,
        **dict(architecture="encoder", position="learned", activation=tuple(THEIR_ACTIVATIONS), norm="layer_norm"),
        **dict(norm_position="post", norm_bias=True, embedding_norm=True, bias=True, kv_heads=config.num_heads),
        **dict(scale_embedding=False, output_bias=False, tie_embeddings=True, parallel_block=False),
        head_width=config.d_model // config.num_heads,
    )
    return dict(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_seq_len,
        hidden_size=config.d_model,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.ff_width,
        hidden_act=THEIR_ACTIVATIONS[config.activation],
        layer_norm_eps=config.norm_eps,
        type_vocab_size=_TOKEN_TYPES,
    )


def _bert_entries(config: TransformerConfig) -> list[Entry]:
    def first_segment(table: Tensor, types: Tensor) -> tuple[Tensor]:
        return (table + types[0],)  # a text of one segment has type 0 everywhere

    def without_types(table: Tensor) -> tuple[Tensor, Tensor]:
        return table, table.new_zeros(_TOKEN_TYPES, table.shape[1])

    positions = ("embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight")
    names = {
        "attention.self.query": "attention.q_proj",
        "attention.self.key": "attention.k_proj",
        "attention.self.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "attention.output.LayerNorm": "attention_norm",
        "intermediate.dense": "feed_forward.up_proj",
        "output.dense": "feed_forward.down_proj",
        "output.LayerNorm": "feed_forward_norm",
    }
    return [
        same("embeddings.word_embeddings.weight", "embedding.weight"),
        Entry(positions, ("stack.position.table.weight",), first_segment, without_types),
        *parts("embeddings", "stack", {"LayerNorm": "embedding_norm"}, True),
        *layers(config.num_layers, lambda i: parts(f"encoder.layer.{i}", f"stack.blocks.{i}", names, True)),
    ]


BERT = Family(
    "bert",
    "BertModel",
    head=("cls.predictions.decoder.weight", "embeddings.word_embeddings.weight"),
    prefix="",
    read_config=_read_bert,
    write_config=_write_bert,
    entries=_bert_entries,
    # The hidden states are what is imported: no pooler, and no head of a pre-training task.
    ignored=re.compile(r"pooler\..*|cls\..*|embeddings\.position_ids"),
)


def mean_pool(hidden: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean of each row's hidden states (B, T, C) over its first lengths (B,) tokens, scaled to unit length:
    the embedding (B, C) of sentence encoders."""
    real = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]  # (B, T)
    pooled = (hidden * real[..., None]).sum(1) / lengths[:, None]
    return pooled / pooled.norm(dim=-1, keepdim=True)
