"""Decoder-only families: Llama, GPT-2, OPT, Falcon."""

from __future__ import annotations

import re
from typing import Any

from warploom.errors import UserError
from warploom.interchange.family import THEIR_ACTIVATIONS, Family, Settings, layers, parts, require_fields
from warploom.interchange.mapping import Entry, below, interleaved, same, stacked, transposed, with_parameters
from warploom.models.config import TransformerConfig


def _read_llama(settings: Settings) -> dict[str, Any]:
    settings.require("hidden_act", "silu", "silu")
    bias = settings.flag("attention_bias", False)
    settings.require("mlp_bias", bias, False)
    return dict(
        vocab_size=settings.number("vocab_size", 32000),
        max_seq_len=settings.number("max_position_embeddings", 2048),
        d_model=settings.number("hidden_size", 4096),
        num_layers=settings.number("num_hidden_layers", 32),
        num_heads=settings.number("num_attention_heads", 32),
        num_kv_heads=settings.number("num_key_value_heads", settings.number("num_attention_heads", 32)),
        head_dim=None if settings.values.get("head_dim") is None else settings.number("head_dim"),
        d_ff=settings.number("intermediate_size", 11008),
        rotary_base=settings.rotary_base(),
        norm_eps=settings.real("rms_norm_eps", 1e-6),
        position="rotary",
        activation="swiglu",
        norm="rms_norm",
        bias=bias,
    )


def _write_llama(config: TransformerConfig) -> dict[str, Any]:
    require_fields(
        config,
        **dict(architecture="decoder", position="rotary", activation="swiglu", norm="rms_norm", norm_position="pre"),
        **dict(parallel_block=False, scale_embedding=False, embedding_norm=False, output_bias=False),
    )
    return dict(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_seq_len,
        hidden_size=config.d_model,
        intermediate_size=config.ff_width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_width,
        hidden_act="silu",
        rms_norm_eps=config.norm_eps,
        # The first is read by transformers 5, the second by 4 and by other programs.
        rope_parameters={"rope_type": "default", "rope_theta": config.rotary_base},
        rope_theta=config.rotary_base,
        attention_bias=config.bias,
        mlp_bias=config.bias,
    )


def _llama_entries(config: TransformerConfig) -> list[Entry]:
    def block(layer: int) -> list[Entry]:
        theirs, ours = f"model.layers.{layer}", f"stack.blocks.{layer}"
        projections = {name: name for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        feed_forward = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
        norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "feed_forward_norm"}
        return [
            *parts(f"{theirs}.self_attn", f"{ours}.attention", projections, config.bias),
            *parts(f"{theirs}.mlp", f"{ours}.feed_forward", feed_forward, config.bias),
            *parts(theirs, ours, norms, False),
        ]

    return [
        same("model.embed_tokens.weight", "embedding.weight"),
        *layers(config.num_layers, block),
        same("model.norm.weight", "stack.norm.weight"),
    ]


def _read_gpt2(settings: Settings) -> dict[str, Any]:
    for name, wanted in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        settings.require(name, wanted, wanted)
    settings.require("add_cross_attention", False, False)
    d_model = settings.number("n_embd", 768)
    return dict(
        vocab_size=settings.number("vocab_size", 50257),
        max_seq_len=settings.number("n_positions", settings.values.get("n_ctx", 1024)),
        d_model=d_model,
        num_layers=settings.number("n_layer", 12),
        num_heads=settings.number("n_head", 12),
        d_ff=settings.number("n_inner", 4 * d_model),
        activation=settings.activation("activation_function", "gelu_new"),
        norm_eps=settings.real("layer_norm_epsilon", 1e-5),
        position="learned",
        bias=True,
    )


def _write_gpt2(config: TransformerConfig) -> dict[str, Any]:
    require_fields(
        config,
        **dict(architecture="decoder", position="learned", activation=tuple(THEIR_ACTIVATIONS), norm="layer_norm"),
        **dict(norm_position="pre", norm_bias=True, bias=True, parallel_block=False, kv_heads=config.num_heads),
        **dict(scale_embedding=False, embedding_norm=False, output_bias=False),
        head_width=config.d_model // config.num_heads,
    )
    return dict(
        vocab_size=config.vocab_size,
        n_positions=config.max_seq_len,
        n_embd=config.d_model,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        n_inner=config.ff_width,
        activation_function=THEIR_ACTIVATIONS[config.activation],
        layer_norm_epsilon=config.norm_eps,
    )


def _gpt2_entries(config: TransformerConfig) -> list[Entry]:
    C = config.d_model

    def block(layer: int) -> list[Entry]:
        theirs, ours = f"transformer.h.{layer}", f"stack.blocks.{layer}"
        qkv = [f"{ours}.attention.{name}_proj" for name in "qkv"]
        entries = [
            stacked(f"{theirs}.attn.c_attn.weight", [f"{name}.weight" for name in qkv], [C, C, C], transpose=True),
            stacked(f"{theirs}.attn.c_attn.bias", [f"{name}.bias" for name in qkv], [C, C, C]),
            *parts(theirs, ours, {"ln_1": "attention_norm", "ln_2": "feed_forward_norm"}, True),
        ]
        for their_name, our_name in (
            ("attn.c_proj", "attention.o_proj"),
            ("mlp.c_fc", "feed_forward.up_proj"),
            ("mlp.c_proj", "feed_forward.down_proj"),
        ):
            entries.append(transposed(f"{theirs}.{their_name}.weight", f"{ours}.{our_name}.weight"))
            entries.append(same(f"{theirs}.{their_name}.bias", f"{ours}.{our_name}.bias"))
        return entries

    return [
        same("transformer.wte.weight", "embedding.weight"),
        same("transformer.wpe.weight", "stack.position.table.weight"),
        *layers(config.num_layers, block),
        *parts("transformer", "stack", {"ln_f": "norm"}, True),
    ]


# OPT's position of the first token.
_OPT_FIRST_POSITION = 2


def _read_opt(settings: Settings) -> dict[str, Any]:
    d_model = settings.number("hidden_size", 768)
    settings.require("word_embed_proj_dim", d_model, d_model)
    settings.require("_remove_final_layer_norm", False, False)
    settings.require("layer_norm_elementwise_affine", True, True)
    return dict(
        vocab_size=settings.number("vocab_size", 50272),
        max_seq_len=settings.number("max_position_embeddings", 2048),
        d_model=d_model,
        num_layers=settings.number("num_hidden_layers", 12),
        num_heads=settings.number("num_attention_heads", 12),
        d_ff=settings.number("ffn_dim", 3072),
        activation=settings.activation("activation_function", "relu"),
        norm_position="pre" if settings.flag("do_layer_norm_before", True) else "post",
        bias=settings.flag("enable_bias", True),
        position="learned",
    )


def _write_opt(config: TransformerConfig) -> dict[str, Any]:
    require_fields(
        config,
        **dict(architecture="decoder", position="learned", activation=tuple(THEIR_ACTIVATIONS), norm="layer_norm"),
        **dict(norm_eps=1e-5, norm_bias=True, parallel_block=False, kv_heads=config.num_heads),
        **dict(scale_embedding=False, embedding_norm=False, output_bias=False),
        head_width=config.d_model // config.num_heads,
    )
    return dict(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_seq_len,
        hidden_size=config.d_model,
        word_embed_proj_dim=config.d_model,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        ffn_dim=config.ff_width,
        activation_function=THEIR_ACTIVATIONS[config.activation],
        do_layer_norm_before=config.norm_position == "pre",
        enable_bias=config.bias,
    )


def _opt_entries(config: TransformerConfig) -> list[Entry]:
    def block(layer: int) -> list[Entry]:
        theirs, ours = f"model.decoder.layers.{layer}", f"stack.blocks.{layer}"
        attention = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "o_proj"}
        norms = {"self_attn_layer_norm": "attention_norm", "final_layer_norm": "feed_forward_norm"}
        feed_forward = {"fc1": "feed_forward.up_proj", "fc2": "feed_forward.down_proj"}
        return [
            *parts(f"{theirs}.self_attn", f"{ours}.attention", attention, config.bias),
            *parts(theirs, ours, norms, True),
            *parts(theirs, ours, feed_forward, config.bias),
        ]

    entries = [
        same("model.decoder.embed_tokens.weight", "embedding.weight"),
        below("model.decoder.embed_positions.weight", "stack.position.table.weight", _OPT_FIRST_POSITION),
        *layers(config.num_layers, block),
    ]
    if config.norm_position == "pre":
        entries += parts("model.decoder", "stack", {"final_layer_norm": "norm"}, True)
    return entries


def _read_falcon(settings: Settings) -> dict[str, Any]:
    settings.require("alibi", False, False)  # its bias is divided by sqrt(D) and rounded to bfloat16
    d_model = settings.number("hidden_size", 4544)
    num_heads = settings.number("num_attention_heads", 71)
    is_new = settings.flag("new_decoder_architecture", False)
    if is_new:
        num_kv_heads, num_norms = settings.number("num_kv_heads", num_heads), 2
        num_norms = settings.number("num_ln_in_parallel_attn", 2)
    else:
        num_kv_heads, num_norms = 1 if settings.flag("multi_query", True) else num_heads, 1
    return dict(
        vocab_size=settings.number("vocab_size", 65024),
        max_seq_len=settings.number("max_position_embeddings", 2048),
        d_model=d_model,
        num_layers=settings.number("num_hidden_layers", 32),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        d_ff=settings.number("ffn_hidden_size", 4 * d_model),
        rotary_base=settings.rotary_base(),
        activation=settings.activation("activation", "gelu"),
        norm_eps=settings.real("layer_norm_epsilon", 1e-5),
        parallel_block=is_new or settings.flag("parallel_attn", True),
        parallel_norms=num_norms,
        bias=settings.flag("bias", False),
        position="rotary",
    )


def _is_new_falcon(config: TransformerConfig) -> bool:
    return config.parallel_block and (config.parallel_norms == 2 or config.kv_heads not in (1, config.num_heads))


def _write_falcon(config: TransformerConfig) -> dict[str, Any]:
    require_fields(
        config,
        **dict(architecture="decoder", position="rotary", activation=tuple(THEIR_ACTIVATIONS), norm="layer_norm"),
        **dict(norm_position="pre", norm_bias=True, scale_embedding=False, embedding_norm=False, output_bias=False),
        head_width=config.d_model // config.num_heads,
    )
    if not config.parallel_block and config.kv_heads not in (1, config.num_heads):
        raise UserError(f"cannot have num_kv_heads {config.kv_heads} without parallel_block")
    is_new = _is_new_falcon(config)
    return dict(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_seq_len,
        hidden_size=config.d_model,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_kv_heads=config.kv_heads,
        ffn_hidden_size=config.ff_width,
        activation=THEIR_ACTIVATIONS[config.activation],
        layer_norm_epsilon=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rotary_base},
        rope_theta=config.rotary_base,
        new_decoder_architecture=is_new,
        num_ln_in_parallel_attn=config.parallel_norms if is_new else None,
        multi_query=config.kv_heads == 1,
        parallel_attn=config.parallel_block,
        alibi=False,
        bias=config.bias,
    )


def _falcon_entries(config: TransformerConfig) -> list[Entry]:
    is_new, group = _is_new_falcon(config), config.num_heads // config.kv_heads
    names = ("weight", "bias") if config.bias else ("weight",)

    def block(layer: int) -> list[Entry]:
        theirs, ours = f"transformer.h.{layer}", f"stack.blocks.{layer}"
        entries = []
        for name in names:
            qkv = [f"{ours}.attention.{part}_proj.{name}" for part in "qkv"]
            entries.append(
                interleaved(f"{theirs}.self_attention.query_key_value.{name}", qkv, [group, 1, 1], config.head_width)
            )
        layer_names = {
            "self_attention.dense": "attention.o_proj",
            "mlp.dense_h_to_4h": "feed_forward.up_proj",
            "mlp.dense_4h_to_h": "feed_forward.down_proj",
        }
        if is_new and config.parallel_norms == 2:
            norms = {"ln_attn": "attention_norm", "ln_mlp": "feed_forward_norm"}
        elif config.parallel_block:
            norms = {"input_layernorm": "attention_norm"}
        else:
            norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "feed_forward_norm"}
        return [*entries, *parts(theirs, ours, layer_names, config.bias), *parts(theirs, ours, norms, True)]

    return [
        same("transformer.word_embeddings.weight", "embedding.weight"),
        *layers(config.num_layers, block),
        *with_parameters(same, "transformer.ln_f", "stack.norm", True),
    ]


LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    head=("lm_head.weight", "model.embed_tokens.weight"),
    prefix="model.",
    read_config=_read_llama,
    write_config=_write_llama,
    entries=_llama_entries,
    ignored=re.compile(r".*\.rotary_emb\.inv_freq"),
)
GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    head=("lm_head.weight", "transformer.wte.weight"),
    prefix="transformer.",
    read_config=_read_gpt2,
    write_config=_write_gpt2,
    entries=_gpt2_entries,
    ignored=re.compile(r".*\.attn\.(bias|masked_bias)"),
)
OPT = Family(
    "opt",
    "OPTForCausalLM",
    head=("lm_head.weight", "model.decoder.embed_tokens.weight"),
    prefix="model.",
    read_config=_read_opt,
    write_config=_write_opt,
    entries=_opt_entries,
)
FALCON = Family(
    "falcon",
    "FalconForCausalLM",
    head=("lm_head.weight", "transformer.word_embeddings.weight"),
    prefix="transformer.",
    read_config=_read_falcon,
    write_config=_write_falcon,
    entries=_falcon_entries,
    ignored=re.compile(r".*\.rotary_emb\.inv_freq"),
)
