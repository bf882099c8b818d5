"""TransformerConfig: every choice that makes one transformer differ from another. What follows from a choice (the
width of a head, say) is a property, so that dataclasses.replace works on any field."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Literal

from warploom.errors import UserError, nearest


@dataclass(frozen=True)
class TransformerConfig:
    """A transformer. Raises UserError for values that do not fit together."""

    architecture: Literal["decoder", "encoder", "encoder-decoder"] = "decoder"
    """decoder: causal. encoder: every token sees every other.
    encoder-decoder: a causal decoder that also reads an encoded source."""
    vocab_size: int = 8192
    """Rows of the token embedding and of the output layer."""
    source_vocab_size: int | None = None
    """encoder-decoder: rows of the source's own embedding; None lets source and target share one table."""
    max_seq_len: int = 1024
    """Longest sequence in tokens: the size of learned position tables and the window that training uses."""
    d_model: int = 384
    """Width of the residual stream."""
    num_layers: int = 6
    """Blocks (encoder-decoder: blocks of the decoder)."""
    num_encoder_layers: int | None = None
    """encoder-decoder: blocks of the encoder; None = num_layers."""
    num_heads: int = 6
    """Query heads of each attention layer."""
    num_kv_heads: int | None = None
    """Key/value heads: 1 is multi-query attention, a divisor of num_heads grouped-query; None = num_heads."""
    head_dim: int | None = None
    """Width of a head; None = d_model / num_heads."""
    d_ff: int | None = None
    """Width of the feed-forward layer; None = 4 * d_model."""
    position: Literal["sinusoidal", "learned", "rotary", "alibi", "t5", "none"] = "rotary"
    """How order enters. sinusoidal, learned: added to the embedding.
    rotary: turns queries and keys.
    alibi, t5: a bias on attention by distance, fixed (alibi) or learned per bucket of distances (t5)."""
    rotary_base: float = 10000.0
    """rotary: about 1 / (2 pi) of the longest wavelength, in tokens."""
    activation: Literal["relu", "relu2", "gelu", "gelu_tanh", "silu", "swiglu", "geglu"] = "relu"
    """Of the feed-forward layer. relu2: squared ReLU. gelu_tanh: the approximation that GPT-2 uses.
    swiglu, geglu: gated by SiLU or by gelu_tanh, with a third matrix."""
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    """Normalisation."""
    norm_position: Literal["pre", "post"] = "pre"
    """pre: before each sub-layer, and once after the last block. post: after each residual sum (the original)."""
    norm_eps: float = 1e-5
    """Added to the variance inside each norm."""
    norm_bias: bool = True
    """layer_norm: a learned shift beside the scale. rms_norm has none."""
    embedding_norm: bool = False
    """Normalise the embedded tokens before the first block (BERT, BART)."""
    parallel_block: bool = False
    """Attention and feed-forward read the same input side by side (Falcon), instead of one after the other."""
    parallel_norms: Literal[1, 2] = 1
    """parallel_block: one norm for both branches (falcon-7b) or one each (falcon-180b)."""
    bias: bool = False
    """Biases in the linear layers of the blocks."""
    tie_embeddings: bool = True
    """The output layer uses the token embedding's weight."""
    output_bias: bool = False
    """A bias in the output layer (Marian)."""
    scale_embedding: bool = False
    """Multiply token embeddings by sqrt(d_model), as the original transformer does."""
    dropout: float = 0.0
    """Probability with which elements of the embeddings and of each sub-layer's output are dropped in training."""
    init_std: float = 0.02
    """Standard deviation of the initial weights.
    Matrices that write to the residual stream get init_std / sqrt(number of them in the stack), as in GPT-2."""

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def ff_width(self) -> int:
        return 4 * self.d_model if self.d_ff is None else self.d_ff

    @property
    def encoder_layers(self) -> int:
        return self.num_layers if self.num_encoder_layers is None else self.num_encoder_layers

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self)).items():
            value, choices = getattr(self, name), typing.get_args(kind)
            if typing.get_origin(kind) is Literal and value not in choices:
                raise UserError(f"{name} cannot be {value!r}{nearest(str(value), map(str, choices))}")
        for name in (
            *("vocab_size", "max_seq_len", "d_model", "num_layers", "num_heads"),
            *("source_vocab_size", "num_encoder_layers", "num_kv_heads", "head_dim", "d_ff"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if self.head_dim is None and self.d_model % self.num_heads:
            raise UserError(
                f"num_heads {self.num_heads} does not divide d_model {self.d_model}: "
                f"take {self._nearest_divisor(self.d_model, self.num_heads)} heads, or set head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise UserError(
                f"num_kv_heads {self.kv_heads} does not divide num_heads {self.num_heads}: "
                f"take {self._nearest_divisor(self.num_heads, self.kv_heads)}"
            )
        if self.position == "rotary" and self.head_width % 2:
            raise UserError(f"rotary positions need an even head width, got {self.head_width}: change head_dim")
        if self.position == "sinusoidal" and self.d_model % 2:
            raise UserError(f"sinusoidal positions need an even d_model, got {self.d_model}")
        if self.rotary_base <= 1:
            raise UserError(f"rotary_base must be above 1, got {self.rotary_base}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        for name in ("norm_eps", "init_std"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")
        if self.parallel_block and self.norm_position == "post":
            raise UserError("parallel_block needs norm_position 'pre', got 'post'")
        if self.architecture == "encoder-decoder":
            if self.parallel_block:
                raise UserError("parallel_block is for architecture 'decoder' or 'encoder', got 'encoder-decoder'")
        else:
            for name in ("num_encoder_layers", "source_vocab_size"):
                if getattr(self, name) is not None:
                    raise UserError(
                        f"{name} is for architecture 'encoder-decoder', got {getattr(self, name)} "
                        f"with {self.architecture!r}: leave it out"
                    )

    @staticmethod
    def _nearest_divisor(number: int, wanted: int) -> int:
        return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - wanted))
