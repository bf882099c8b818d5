"""Models by name: those of the literature, and small ones that train on the machine at hand."""

from __future__ import annotations

from typing import Any

from warploom.errors import UserError, nearest
from warploom.models.config import TransformerConfig

_GPT2: dict[str, Any] = dict(
    vocab_size=50257, max_seq_len=1024, position="learned", activation="gelu_tanh", norm_eps=1e-5, bias=True
)
_LLAMA2: dict[str, Any] = dict(
    vocab_size=32000,
    max_seq_len=4096,
    position="rotary",
    activation="swiglu",
    norm="rms_norm",
    norm_eps=1e-5,
    tie_embeddings=False,
)
_FALCON: dict[str, Any] = dict(
    vocab_size=65024, max_seq_len=2048, position="rotary", activation="gelu", head_dim=64, parallel_block=True
)

PRESETS: dict[str, TransformerConfig] = {
    # Trained here: rotary positions, ReLU, no biases, tied. Parameters: 1.3M, 4.2M, 13.8M, 110M.
    "nano": TransformerConfig(vocab_size=4096, max_seq_len=256, d_model=128, num_layers=4, num_heads=4),
    "tiny": TransformerConfig(vocab_size=4096, max_seq_len=256, d_model=256, num_layers=4, num_heads=4),
    "small": TransformerConfig(vocab_size=8192, max_seq_len=256, d_model=384, num_layers=6, num_heads=6),
    "base": TransformerConfig(vocab_size=32768, max_seq_len=1024, d_model=768, num_layers=12, num_heads=12),
    # Vaswani et al., 2017, base; one vocabulary of 37000 for both languages.
    "transformer-base": TransformerConfig(
        architecture="encoder-decoder",
        vocab_size=37000,
        max_seq_len=512,
        d_model=512,
        num_layers=6,
        num_heads=8,
        d_ff=2048,
        position="sinusoidal",
        activation="relu",
        norm_position="post",
        bias=True,
        scale_embedding=True,
        dropout=0.1,
    ),
    # Radford et al., 2019. Dropout is 0.1 in their training; set it for training of several epochs.
    "gpt2": TransformerConfig(**_GPT2, d_model=768, num_layers=12, num_heads=12),
    "gpt2-medium": TransformerConfig(**_GPT2, d_model=1024, num_layers=24, num_heads=16),
    "gpt2-large": TransformerConfig(**_GPT2, d_model=1280, num_layers=36, num_heads=20),
    "gpt2-xl": TransformerConfig(**_GPT2, d_model=1600, num_layers=48, num_heads=25),
    # Brown et al., 2020. Every other layer of theirs attends locally, which changes no weight; here all are dense.
    "gpt3-175b": TransformerConfig(**{**_GPT2, "max_seq_len": 2048}, d_model=12288, num_layers=96, num_heads=96),
    # Touvron et al., 2023.
    "llama2-7b": TransformerConfig(**_LLAMA2, d_model=4096, num_layers=32, num_heads=32, d_ff=11008),
    "llama2-70b": TransformerConfig(**_LLAMA2, d_model=8192, num_layers=80, num_heads=64, num_kv_heads=8, d_ff=28672),
    # Almazrouei et al., 2023. The output layer of 180B has its own matrix, as in the published checkpoint.
    "falcon-7b": TransformerConfig(**_FALCON, d_model=4544, num_layers=32, num_heads=71, num_kv_heads=1),
    "falcon-180b": TransformerConfig(
        **_FALCON,
        d_model=14848,
        num_layers=80,
        num_heads=232,
        num_kv_heads=8,
        parallel_norms=2,
        tie_embeddings=False,
    ),
}


def preset(name: str) -> TransformerConfig:
    """Return the configuration called name. Raises UserError for an unknown name, with the nearest ones."""
    if name not in PRESETS:
        raise UserError(f"no model preset is called {name!r}{nearest(name, PRESETS)}")
    return PRESETS[name]
