"""GGUF files, the format of llama.cpp: Llama and GPT-2 models with their tokenizer, quantised or not, in and out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from warploom.checkpoint.load import load_weights
from warploom.data.tokenizer import Tokenizer
from warploom.errors import UserError
from warploom.interchange import vocabulary
from warploom.interchange.decoders import GPT2, LLAMA
from warploom.interchange.family import layers, parts
from warploom.interchange.mapping import Entry, dump_tensors, load_tensors, refuse_rest, same, stacked, with_parameters
from warploom.models.config import TransformerConfig
from warploom.models.transformer import Transformer

Precision = Literal["f32", "f16", "q8_0"]

# A rotary file may hold the table of its wavelengths, which follow from the base.
_IGNORED = {"rope_freqs.weight"}


@dataclass(frozen=True)
class _Architecture:
    read_config: Callable[[_Fields], dict[str, Any]]
    entries: Callable[[TransformerConfig], list[Entry]]


class _Fields:
    """The metadata of a file, by names without the architecture's prefix."""

    def __init__(self, values: dict[str, Any], path: Path) -> None:
        self.values, self.path = values, path
        self.architecture = values["general.architecture"]

    def __getitem__(self, name: str) -> Any:
        key = f"{self.architecture}.{name}"
        if key not in self.values:
            raise UserError(f"{self.path} does not say {key}; it is not whole")
        return self.values[key]

    def get(self, name: str, default: Any) -> Any:
        return self.values.get(f"{self.architecture}.{name}", default)


def import_gguf(path: str | os.PathLike[str]) -> tuple[Transformer, Tokenizer | None]:
    """Build the model of a GGUF file, its weights dequantised to float32, and its tokenizer.

    Raises UserError for a damaged file and for an architecture or tokenizer that is not known.
    """
    library, path = _library(), Path(path)
    try:
        reader = library.GGUFReader(path)
        fields = _Fields({name: field.contents() for name, field in reader.fields.items()}, path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{path} is no whole GGUF file: {error}") from error
    if fields.architecture not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise UserError(f"{path} is a {fields.architecture!r} model; those that can be imported: {known}")
    architecture = _ARCHITECTURES[fields.architecture]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    used = set(tensors) - _IGNORED
    words = tensors["token_embd.weight"].shape[-1] if "token_embd.weight" in tensors else 0
    config = TransformerConfig(
        **architecture.read_config(fields),
        vocab_size=int(words),
        tie_embeddings="output.weight" not in used,
        bias="blk.0.attn_output.bias" in used,
    )

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        try:
            return torch.from_numpy(library.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        except (NotImplementedError, ValueError) as error:
            raise UserError(f"{path}: {name} is stored as {tensor.tensor_type.name}: {error}") from error

    entries = architecture.entries(config)
    weights = load_tensors(entries, read, set(tensors), str(path))
    refuse_rest(entries, used, str(path))
    with torch.device("meta"):
        model = Transformer(config)
    load_weights(model, weights)
    return model.eval(), _tokenizer(fields)


def export_gguf(
    model: Transformer,
    path: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    precision: Precision = "f32",
    name: str = "warploom",
) -> Path:
    """Write a model as a GGUF file; returns its path.

    precision: of the matrices; vectors and learned positions stay float32. q8_0 holds 32 weights in 34 bytes.
    Raises UserError for a model that is neither a Llama nor a GPT-2, and if the file exists.
    """
    library, path = _library(), Path(path)
    config = model.config
    reasons = []
    for kind, family in (("llama", LLAMA), ("gpt2", GPT2)):
        try:
            family.write_config(config)
            break
        except UserError as error:
            reasons.append(f"{kind} {error}")
    else:
        raise UserError(f"no architecture of GGUF files that is known here is this model: {'; '.join(reasons)}")
    if path.exists():
        raise UserError(f"{path} exists already; name a new file")
    architecture = _ARCHITECTURES[kind]
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = library.GGUFWriter(path, kind)
    writer.add_name(name)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.ff_width)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_vocab_size(config.vocab_size)
    if kind == "llama":
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_rope_freq_base(config.rotary_base)
        writer.add_rope_dimension_count(config.head_width)
        writer.add_key_length(config.head_width)
        writer.add_value_length(config.head_width)
    else:
        writer.add_layer_norm_eps(config.norm_eps)
    if tokenizer is not None:
        _write_tokenizer(writer, tokenizer)
    stored = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0"}[precision]
    writer.add_file_type({"f32": 0, "f16": 1, "q8_0": 7}[precision])
    for tensor_name, tensor in dump_tensors(architecture.entries(config), model.state_dict()).items():
        array = tensor.float().cpu().numpy()
        block = 32 if precision == "q8_0" else 1
        is_matrix = array.ndim == 2 and tensor_name != "position_embd.weight" and array.shape[1] % block == 0
        kind_stored = library.GGMLQuantizationType[stored if is_matrix else "F32"]
        writer.add_tensor(tensor_name, library.quants.quantize(array, kind_stored), raw_dtype=kind_stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need the gguf library: pip install 'warploom[interchange]'") from None
    return gguf


def _read_llama(fields: _Fields) -> dict[str, Any]:
    if fields.get("rope.scaling.type", "none") != "none":
        raise UserError(f"{fields.path} scales its rotary positions, which is not supported")
    num_heads, d_model = int(fields["attention.head_count"]), int(fields["embedding_length"])
    head_dim = int(fields.get("attention.key_length", d_model // num_heads))
    if int(fields.get("rope.dimension_count", head_dim)) != head_dim:
        raise UserError(f"{fields.path} turns only a part of each head, which is not supported")
    if fields.get("expert_count", 0):
        raise UserError(f"{fields.path} is a mixture of experts, which is not supported")
    return dict(
        max_seq_len=int(fields["context_length"]),
        d_model=d_model,
        num_layers=int(fields["block_count"]),
        num_heads=num_heads,
        num_kv_heads=int(fields.get("attention.head_count_kv", num_heads)),
        head_dim=head_dim,
        d_ff=int(fields["feed_forward_length"]),
        rotary_base=float(fields.get("rope.freq_base", 10000.0)),
        norm_eps=float(fields["attention.layer_norm_rms_epsilon"]),
        position="rotary",
        activation="swiglu",
        norm="rms_norm",
    )


def _neighbours(theirs: str, ours: str, head_dim: int) -> Entry:
    """Rows of queries or keys: llama.cpp turns neighbours, ours turns halves of a head."""

    def load(x: Tensor) -> tuple[Tensor]:
        return (x.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2),)

    def dump(x: Tensor) -> tuple[Tensor]:
        return (x.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2),)

    return Entry((theirs,), (ours,), load, dump)


def _llama_entries(config: TransformerConfig) -> list[Entry]:
    def block(layer: int) -> list[Entry]:
        theirs, ours = f"blk.{layer}", f"stack.blocks.{layer}"
        names = {
            "attn_v": "attention.v_proj",
            "attn_output": "attention.o_proj",
            "ffn_gate": "feed_forward.gate_proj",
            "ffn_up": "feed_forward.up_proj",
            "ffn_down": "feed_forward.down_proj",
        }
        norms = {"attn_norm": "attention_norm", "ffn_norm": "feed_forward_norm"}
        turned = [
            _neighbours(f"{theirs}.attn_{part}.{kind}", f"{ours}.attention.{part}_proj.{kind}", config.head_width)
            for part in "qk"
            for kind in (("weight", "bias") if config.bias else ("weight",))
        ]
        return [*turned, *parts(theirs, ours, names, config.bias), *parts(theirs, ours, norms, False)]

    return [
        same("token_embd.weight", "embedding.weight"),
        *layers(config.num_layers, block),
        same("output_norm.weight", "stack.norm.weight"),
        *_output_entries(config),
    ]


def _read_gpt2(fields: _Fields) -> dict[str, Any]:
    return dict(
        max_seq_len=int(fields["context_length"]),
        d_model=int(fields["embedding_length"]),
        num_layers=int(fields["block_count"]),
        num_heads=int(fields["attention.head_count"]),
        d_ff=int(fields["feed_forward_length"]),
        norm_eps=float(fields["attention.layer_norm_epsilon"]),
        position="learned",
        activation="gelu_tanh",
    )


def _gpt2_entries(config: TransformerConfig) -> list[Entry]:
    C = config.d_model

    def block(layer: int) -> list[Entry]:
        theirs, ours = f"blk.{layer}", f"stack.blocks.{layer}"
        names = {
            "attn_norm": "attention_norm",
            "attn_output": "attention.o_proj",
            "ffn_norm": "feed_forward_norm",
            "ffn_up": "feed_forward.up_proj",
            "ffn_down": "feed_forward.down_proj",
        }
        fused = [
            stacked(f"{theirs}.attn_qkv.{kind}", [f"{ours}.attention.{part}_proj.{kind}" for part in "qkv"], [C, C, C])
            for kind in ("weight", "bias")
        ]
        return [*fused, *parts(theirs, ours, names, True)]

    return [
        same("token_embd.weight", "embedding.weight"),
        same("position_embd.weight", "stack.position.table.weight"),
        *layers(config.num_layers, block),
        *with_parameters(same, "output_norm", "stack.norm", True),
        *_output_entries(config),
    ]


def _output_entries(config: TransformerConfig) -> list[Entry]:
    return [] if config.tie_embeddings else [same("output.weight", "lm_head.weight")]


_ARCHITECTURES = {
    "llama": _Architecture(_read_llama, _llama_entries),
    "gpt2": _Architecture(_read_gpt2, _gpt2_entries),
}


def _tokenizer(fields: _Fields) -> Tokenizer | None:
    values = fields.values
    if "tokenizer.ggml.tokens" not in values:
        return None
    if "tokenizer.ggml.eos_token_id" not in values:
        raise UserError(f"{fields.path} does not say which token ends a text")
    begins = values.get("tokenizer.ggml.add_bos_token", values["tokenizer.ggml.model"] == "llama")
    bos_id = values.get("tokenizer.ggml.bos_token_id")
    return Tokenizer.adopt(
        vocabulary.from_gguf(values),
        eos_id=int(values["tokenizer.ggml.eos_token_id"]),
        begin_ids=[int(bos_id)] if begins and bos_id is not None else [],
        bos_id=None if bos_id is None else int(bos_id),
        chat_template=values.get("tokenizer.chat_template"),
    )


def _write_tokenizer(writer: Any, tokenizer: Tokenizer) -> None:
    """Write a byte-level BPE; other kinds would not come back as they are."""
    document = json.loads(tokenizer.library_json())
    pre = vocabulary.gguf_pattern(document) if document["model"]["type"] == "BPE" else None
    if pre is None:
        raise UserError("a GGUF file holds only byte-level BPE tokenizers with a known pattern; export without one")
    tokens = [tokenizer.token(index) or f"<unused {index}>" for index in range(tokenizer.vocab_size)]
    control = {added["content"] for added in document["added_tokens"] if added["special"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([vocabulary.CONTROL if token in control else vocabulary.NORMAL for token in tokens])
    merges = document["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_bos_token_id(tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id)
    writer.add_add_bos_token(bool(tokenizer.begin_ids))
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
