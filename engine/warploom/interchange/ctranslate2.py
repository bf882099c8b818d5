"""CTranslate2 Transformers: pre-norm encoder-decoders of OpenNMT, as safetensors with CTranslate2 names."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from warploom.checkpoint.load import load_weights
from warploom.errors import UserError
from warploom.interchange.family import layers
from warploom.interchange.hugging_face import TensorReader, tensor_names
from warploom.interchange.mapping import Entry, load_tensors, refuse_rest, same, stacked
from warploom.models.config import TransformerConfig
from warploom.models.transformer import Transformer


def import_ctranslate2(path: str | os.PathLike[str], num_heads: int, max_seq_len: int = 512) -> Transformer:
    """Build the model of a safetensors file with CTranslate2's names, which does not say its number of heads.

    Its positions are sinusoids that begin at 1 with other frequencies than ours; they become a learned table of
    max_seq_len rows. Raises UserError for a file that is damaged or of another architecture.
    """
    path = Path(path)
    names = {name: (path, name) for name in tensor_names(path)}
    with TensorReader(names) as read:
        for name in ("encoder/embeddings/weight", "decoder/embeddings/weight", "decoder/projection/weight"):
            if name not in names:
                raise UserError(f"{path} lacks {name}; it is no CTranslate2 Transformer")
        source_words, d_model = read("encoder/embeddings/weight").shape
        config = TransformerConfig(
            architecture="encoder-decoder",
            vocab_size=read("decoder/embeddings/weight").shape[0],
            source_vocab_size=source_words,
            max_seq_len=max_seq_len,
            d_model=d_model,
            num_layers=_count(names, "decoder"),
            num_encoder_layers=_count(names, "encoder"),
            num_heads=num_heads,
            d_ff=read("decoder/layer_0/ffn/linear_0/weight").shape[0],
            position="learned",
            activation="relu",
            bias=True,
            scale_embedding=True,
            tie_embeddings=False,
            output_bias=True,
        )
        entries = _entries(config)
        weights = load_tensors(entries, read, set(names), str(path))
        refuse_rest(entries, names, str(path))
    positions = _positions(max_seq_len, d_model)
    for stack in ("encoder", "stack"):
        weights[f"{stack}.position.table.weight"] = positions.clone()
    with torch.device("meta"):
        model = Transformer(config)
    load_weights(model, weights)
    return model.eval()


def _count(names: dict[str, tuple[Path, str]], stack: str) -> int:
    return len({name.split("/")[1] for name in names if name.startswith(f"{stack}/layer_") and "/ffn/" in name})


def _positions(num_positions: int, d_model: int) -> Tensor:
    """Sines, then cosines, of positions from 1 on; the longest wavelength belongs to the last frequency."""
    count = d_model // 2
    rates = torch.exp(torch.arange(count, dtype=torch.float64) * (-math.log(10000.0) / (count - 1)))
    angles = torch.arange(1, num_positions + 1, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def _entries(config: TransformerConfig) -> list[Entry]:
    C = config.d_model

    def linear(theirs: str, *ours: str) -> list[Entry]:
        rows = [C] * len(ours)
        if len(ours) == 1:
            return [same(f"{theirs}/{kind}", f"{ours[0]}.{kind}") for kind in ("weight", "bias")]
        return [stacked(f"{theirs}/{kind}", [f"{name}.{kind}" for name in ours], rows) for kind in ("weight", "bias")]

    def norm(theirs: str, ours: str) -> list[Entry]:
        return [same(f"{theirs}/gamma", f"{ours}.weight"), same(f"{theirs}/beta", f"{ours}.bias")]

    def block(theirs: str, ours: str, has_cross: bool) -> list[Entry]:
        attention, cross = f"{ours}.attention", f"{ours}.cross_attention"
        entries = [
            *linear(f"{theirs}/self_attention/linear_0", *(f"{attention}.{part}_proj" for part in "qkv")),
            *linear(f"{theirs}/self_attention/linear_1", f"{attention}.o_proj"),
            *norm(f"{theirs}/self_attention/layer_norm", f"{ours}.attention_norm"),
            *linear(f"{theirs}/ffn/linear_0", f"{ours}.feed_forward.up_proj"),
            *linear(f"{theirs}/ffn/linear_1", f"{ours}.feed_forward.down_proj"),
            *norm(f"{theirs}/ffn/layer_norm", f"{ours}.feed_forward_norm"),
        ]
        if has_cross:
            entries += linear(f"{theirs}/attention/linear_0", f"{cross}.q_proj")
            entries += linear(f"{theirs}/attention/linear_1", *(f"{cross}.{part}_proj" for part in "kv"))
            entries += linear(f"{theirs}/attention/linear_2", f"{cross}.o_proj")
            entries += norm(f"{theirs}/attention/layer_norm", f"{ours}.cross_attention_norm")
        return entries

    return [
        same("encoder/embeddings/weight", "source_embedding.weight"),
        same("decoder/embeddings/weight", "embedding.weight"),
        *layers(config.encoder_layers, lambda i: block(f"encoder/layer_{i}", f"encoder.blocks.{i}", False)),
        *layers(config.num_layers, lambda i: block(f"decoder/layer_{i}", f"stack.blocks.{i}", True)),
        *norm("encoder/layer_norm", "encoder.norm"),
        *norm("decoder/layer_norm", "stack.norm"),
        same("decoder/projection/weight", "lm_head.weight"),
        same("decoder/projection/bias", "output_bias"),
    ]
