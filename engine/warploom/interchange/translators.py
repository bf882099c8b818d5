"""Encoder-decoder families: T5, BART, Marian."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import Tensor

from warploom.errors import UserError
from warploom.interchange.family import (
    THEIR_ACTIVATIONS,
    Family,
    Settings,
    layers,
    logits_bias_constant,
    parts,
    require_fields,
)
from warploom.interchange.mapping import Entry, below, same, scaled
from warploom.models.config import TransformerConfig

# feed_forward_proj of T5 and ours; T5 means the tanh approximation by a gated GELU.
_T5_FEED_FORWARDS = {"relu": "relu", "gated-gelu": "geglu", "gelu_new": "gelu_tanh", "gated-silu": "swiglu"}


def _read_t5(settings: Settings) -> dict[str, Any]:
    settings.require("relative_attention_num_buckets", 32, 32)
    settings.require("relative_attention_max_distance", 128, 128)
    feed_forward = settings.values.get("feed_forward_proj", "relu")
    if feed_forward not in _T5_FEED_FORWARDS:
        known = ", ".join(_T5_FEED_FORWARDS)
        raise UserError(f"{settings.path} says feed_forward_proj {feed_forward!r}; known: {known}")
    num_layers = settings.number("num_layers", 6)
    return dict(
        architecture="encoder-decoder",
        vocab_size=settings.number("vocab_size", 32128),
        max_seq_len=settings.number("n_positions", 512),
        d_model=settings.number("d_model", 512),
        num_layers=settings.number("num_decoder_layers", num_layers),
        num_encoder_layers=num_layers,
        num_heads=settings.number("num_heads", 8),
        head_dim=settings.number("d_kv", 64),
        d_ff=settings.number("d_ff", 2048),
        activation=_T5_FEED_FORWARDS[feed_forward],
        norm_eps=settings.real("layer_norm_epsilon", 1e-6),
        norm="rms_norm",
        position="t5",
    )


def _write_t5(config: TransformerConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in _T5_FEED_FORWARDS.items()}
    require_fields(
        config,
        **dict(architecture="encoder-decoder", position="t5", activation=tuple(theirs), norm="rms_norm", bias=False),
        **dict(norm_position="pre", kv_heads=config.num_heads, scale_embedding=False, embedding_norm=False),
        **dict(output_bias=False, source_vocab_size=None),
    )
    return dict(
        vocab_size=config.vocab_size,
        n_positions=config.max_seq_len,
        d_model=config.d_model,
        d_kv=config.head_width,
        d_ff=config.ff_width,
        num_layers=config.encoder_layers,
        num_decoder_layers=config.num_layers,
        num_heads=config.num_heads,
        feed_forward_proj=theirs[config.activation],
        layer_norm_epsilon=config.norm_eps,
        is_encoder_decoder=True,
    )


def _t5_entries(config: TransformerConfig) -> list[Entry]:
    # T5 does not divide q k^T by sqrt(D), and a tied model divides its last hidden states by sqrt(C). Both constants
    # go into weights, which are linear in front of them.
    query_scale = math.sqrt(config.head_width)
    output_scale = config.d_model**-0.5 if config.tie_embeddings else 1.0
    projections = {"k": "k_proj", "v": "v_proj", "o": "o_proj"}
    gated = config.activation in ("geglu", "swiglu")
    feed_forward = {"wi_0": "gate_proj", "wi_1": "up_proj"} if gated else {"wi": "up_proj"}

    def block(theirs: str, ours: str, has_cross: bool) -> list[Entry]:
        entries = []
        attentions = [("SelfAttention", "attention")] + [("EncDecAttention", "cross_attention")] * has_cross
        for index, (their_name, our_name) in enumerate(attentions):
            source, target = f"{theirs}.layer.{index}.{their_name}", f"{ours}.{our_name}"
            entries.append(scaled(f"{source}.q.weight", f"{target}.q_proj.weight", query_scale))
            entries += parts(source, target, projections, False)
            entries += parts(theirs, ours, {f"layer.{index}.layer_norm": f"{our_name}_norm"}, False)
        last = f"{theirs}.layer.{len(attentions)}"
        names = {**feed_forward, "wo": "down_proj"}
        entries += parts(f"{last}.DenseReluDense", f"{ours}.feed_forward", names, False)
        return [*entries, *parts(last, ours, {"layer_norm": "feed_forward_norm"}, False)]

    def stack(theirs: str, ours: str, count: int, has_cross: bool) -> list[Entry]:
        bias = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        return [
            same(bias, f"{ours}.position.table.weight"),
            *layers(count, lambda layer: block(f"{theirs}.block.{layer}", f"{ours}.blocks.{layer}", has_cross)),
        ]

    return [
        same("shared.weight", "embedding.weight"),
        *stack("encoder", "encoder", config.encoder_layers, False),
        same("encoder.final_layer_norm.weight", "encoder.norm.weight"),
        *stack("decoder", "stack", config.num_layers, True),
        scaled("decoder.final_layer_norm.weight", "stack.norm.weight", output_scale),
    ]


def _correct_t5(settings: Settings, config: TransformerConfig, weights: dict[str, Tensor]) -> None:
    """transformers 5 says whether the last hidden states are divided; before it, those of tied models were."""
    is_scaled = settings.flag("scale_decoder_outputs", settings.values.get("tie_word_embeddings") is not False)
    if is_scaled != config.tie_embeddings:
        weights["stack.norm.weight"] *= config.d_model ** (-0.5 if is_scaled else 0.5)


def _read_bart(settings: Settings) -> dict[str, Any]:
    heads = settings.number("decoder_attention_heads", 16)
    settings.require("encoder_attention_heads", heads, 16)
    width = settings.number("decoder_ffn_dim", 4096)
    settings.require("encoder_ffn_dim", width, 4096)
    settings.require("normalize_before", False, False)
    settings.require("static_position_embeddings", False, False)
    return dict(
        architecture="encoder-decoder",
        vocab_size=settings.number("vocab_size", 50265),
        max_seq_len=settings.number("max_position_embeddings", 1024),
        d_model=settings.number("d_model", 1024),
        num_layers=settings.number("decoder_layers", 12),
        num_encoder_layers=settings.number("encoder_layers", 12),
        num_heads=heads,
        d_ff=width,
        activation=settings.activation("activation_function", "gelu"),
        scale_embedding=settings.flag("scale_embedding", False),
        position="learned",
        norm_position="post",
        embedding_norm=True,
        output_bias=True,
        bias=True,
    )


def _write_bart(config: TransformerConfig) -> dict[str, Any]:
    require_fields(config, position="learned", embedding_norm=True, source_vocab_size=None)
    return _write_bart_or_marian(config)


def _write_bart_or_marian(config: TransformerConfig) -> dict[str, Any]:
    require_fields(
        config,
        **dict(architecture="encoder-decoder", activation=tuple(THEIR_ACTIVATIONS), norm="layer_norm", norm_bias=True),
        **dict(norm_position="post", norm_eps=1e-5, bias=True, kv_heads=config.num_heads, tie_embeddings=True),
        head_width=config.d_model // config.num_heads,
    )
    return dict(
        max_position_embeddings=config.max_seq_len,
        d_model=config.d_model,
        decoder_layers=config.num_layers,
        encoder_layers=config.encoder_layers,
        decoder_attention_heads=config.num_heads,
        encoder_attention_heads=config.num_heads,
        decoder_ffn_dim=config.ff_width,
        encoder_ffn_dim=config.ff_width,
        vocab_size=config.vocab_size if config.source_vocab_size is None else config.source_vocab_size,
        activation_function=THEIR_ACTIVATIONS[config.activation],
        scale_embedding=config.scale_embedding,
        is_encoder_decoder=True,
        forced_eos_token_id=None,
    )


# BART's position of the first token.
_BART_FIRST_POSITION = 2


def _bart_stacks(config: TransformerConfig) -> list[Entry]:
    attention = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "o_proj"}
    names = {
        "self_attn_layer_norm": "attention_norm",
        "final_layer_norm": "feed_forward_norm",
        "fc1": "feed_forward.up_proj",
        "fc2": "feed_forward.down_proj",
    }

    def block(theirs: str, ours: str, has_cross: bool) -> list[Entry]:
        entries = [
            *parts(f"{theirs}.self_attn", f"{ours}.attention", attention, True),
            *parts(theirs, ours, names, True),
        ]
        if has_cross:
            entries += parts(f"{theirs}.encoder_attn", f"{ours}.cross_attention", attention, True)
            entries += parts(theirs, ours, {"encoder_attn_layer_norm": "cross_attention_norm"}, True)
        return entries

    entries = [
        *layers(
            config.encoder_layers, lambda i: block(f"model.encoder.layers.{i}", f"encoder.blocks.{i}", has_cross=False)
        ),
        *layers(config.num_layers, lambda i: block(f"model.decoder.layers.{i}", f"stack.blocks.{i}", has_cross=True)),
    ]
    if config.output_bias:
        entries.append(
            Entry(("final_logits_bias",), ("output_bias",), lambda bias: (bias[0],), lambda bias: (bias[None],))
        )
    return entries


def _bart_entries(config: TransformerConfig) -> list[Entry]:
    entries = [same("model.shared.weight", "embedding.weight")]
    for theirs, ours in (("model.encoder", "encoder"), ("model.decoder", "stack")):
        table = f"{theirs}.embed_positions.weight"
        entries.append(below(table, f"{ours}.position.table.weight", _BART_FIRST_POSITION))
        entries += parts(theirs, ours, {"layernorm_embedding": "embedding_norm"}, True)
    return [*entries, *_bart_stacks(config)]


def _read_marian(settings: Settings) -> dict[str, Any]:
    fields = _read_bart(settings)
    vocab_size = settings.number("decoder_vocab_size", fields["vocab_size"])
    is_shared = settings.flag("share_encoder_decoder_embeddings", True)
    if is_shared and vocab_size != fields["vocab_size"]:
        raise UserError(
            f"{settings.path} shares embeddings between vocabularies of {fields['vocab_size']} and {vocab_size} words"
        )
    return {
        **fields,
        "vocab_size": vocab_size,
        "source_vocab_size": None if is_shared else fields["vocab_size"],
        "position": "sinusoidal",
        "embedding_norm": False,
    }


def _write_marian(config: TransformerConfig) -> dict[str, Any]:
    require_fields(config, position="sinusoidal", embedding_norm=False)
    return dict(
        _write_bart_or_marian(config),
        decoder_vocab_size=config.vocab_size,
        share_encoder_decoder_embeddings=config.source_vocab_size is None,
    )


def _marian_entries(config: TransformerConfig) -> list[Entry]:
    if config.source_vocab_size is None:
        embeddings = [same("model.shared.weight", "embedding.weight")]
    else:
        embeddings = [
            same("model.encoder.embed_tokens.weight", "source_embedding.weight"),
            same("model.decoder.embed_tokens.weight", "embedding.weight"),
        ]
    return [*embeddings, *_bart_stacks(config)]


T5 = Family(
    "t5",
    "T5ForConditionalGeneration",
    head=("lm_head.weight", "shared.weight"),
    prefix="",
    read_config=_read_t5,
    write_config=_write_t5,
    entries=_t5_entries,
    correct=_correct_t5,
    # The embedding under its other names; and a bias that early checkpoints hold for cross-attention, always unused.
    ignored=re.compile(
        r"(encoder|decoder)\.embed_tokens\.weight|decoder.*\.EncDecAttention\.relative_attention_bias.*"
    ),
)
BART = Family(
    "bart",
    "BartForConditionalGeneration",
    head=("lm_head.weight", "model.shared.weight"),
    prefix="model.",
    read_config=_read_bart,
    write_config=_write_bart,
    entries=_bart_entries,
    ignored=re.compile(r"model\.(encoder|decoder)\.embed_tokens\.weight"),
    constants=logits_bias_constant,
)
MARIAN = Family(
    "marian",
    "MarianMTModel",
    head=("lm_head.weight", "model.shared.weight"),
    prefix="model.",
    read_config=_read_marian,
    write_config=_write_marian,
    entries=_marian_entries,
    # The embedding under its other names; positions are computed, not learned.
    ignored=re.compile(r"model\.(encoder|decoder)\.(embed_tokens|embed_positions)\.weight|model\.shared\.weight"),
    constants=logits_bias_constant,
)
