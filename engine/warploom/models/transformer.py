"""Transformer: embedding, one or two stacks of blocks, output layer. One device, no logging, no I/O.

Names in the state_dict, fixed because checkpoints hold them:

    embedding.weight                          (vocab_size, C)
    source_embedding.weight                   (source_vocab_size, C), only where the source has its own vocabulary
    {stack}.position.table.weight             learned positions (max_seq_len, C) or T5 buckets (num_buckets, H)
    {stack}.blocks.{i}.{attention,cross_attention}.{q,k,v,o}_proj.{weight,bias}
    {stack}.blocks.{i}.feed_forward.{gate,up,down}_proj.{weight,bias}
    {stack}.blocks.{i}.{attention,cross_attention,feed_forward}_norm.{weight,bias}
    {stack}.norm.{weight,bias}                pre-norm only
    lm_head.weight                            (vocab_size, C), untied only

{stack} is `stack` for the tokens the model predicts, and `encoder` for the source of an encoder-decoder.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from warploom.models.blocks import FINAL_NORMS, POSITIONS, build_block
from warploom.models.config import TransformerConfig
from warploom.nn.attention import AttentionCache, AttentionContext
from warploom.nn.embedding import Embedding
from warploom.nn.linear import Linear
from warploom.nn.norm import Norm
from warploom.ops.linear_cross_entropy import linear_cross_entropy

# The last module of each sub-layer: what it returns is added to the residual stream.
RESIDUAL_WRITERS = ("o_proj", "down_proj")


class Stack(nn.Module):
    """Positions, blocks and final norm. causal: no token sees a later one. cross: blocks read an encoded source."""

    def __init__(self, config: TransformerConfig, num_layers: int, causal: bool, cross: bool) -> None:
        super().__init__()
        self.causal = causal
        self.position = POSITIONS[config.position](config, causal)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(build_block(config, layer, cross) for layer in range(num_layers))
        self.norm = FINAL_NORMS[config.norm_position](config)

    def forward(
        self,
        x: Tensor,
        *,
        dtype: torch.dtype,
        positions: Tensor,
        window: int,
        key_lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: AttentionCache | None = None,
        memory: Tensor | None = None,
        memory_lengths: Tensor | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """Return the hidden states (B, T, C) in dtype of the embedded tokens x (B, T, C).

        window: no document is longer. recompute: keep only what enters each block and run it again in the backward
        pass.
        """
        T = x.shape[1]
        if cu_seqlens is None:
            num_keys = T if cache is None else cache.num_keys(T)
            bias = self.position.bias(positions, num_keys)
        else:
            bias = self.position.bias(torch.arange(window, device=x.device), window)
        context = AttentionContext(
            positions=positions,
            rotate=self.position.rotate,
            # One token alone sees all of its row: that is what a cache with rows of unequal length needs.
            causal=self.causal and T > 1,
            bias=bias,
            cu_seqlens=cu_seqlens,
            key_lengths=key_lengths,
            cache=cache,
            memory=memory,
            memory_lengths=memory_lengths,
        )
        x = self.dropout(self.position.embed(x, positions).to(dtype))
        stream = None
        for block in self.blocks:
            if recompute and torch.is_grad_enabled():
                x, stream = checkpoint(block, x, stream, context, use_reentrant=False)
            else:
                x, stream = block(x, stream, context)
        return self.norm(x, stream)[0]


class Transformer(nn.Module):
    """The model a TransformerConfig describes, with random weights (see init_weights; none on the meta device).

    compute_dtype: dtype of the activations, float32 at first. Parameters stay as they are and are cast where they are
    used. gradient_checkpointing: run each block again in the backward pass instead of keeping its activations.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.gradient_checkpointing = False
        scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        self.embedding = Embedding(config.vocab_size, config.d_model, scale)
        self.source_embedding: Embedding | None = None
        self.encoder: Stack | None = None
        if config.architecture == "encoder-decoder":
            if config.source_vocab_size is not None:
                self.source_embedding = Embedding(config.source_vocab_size, config.d_model, scale)
            self.encoder = Stack(config, config.encoder_layers, causal=False, cross=False)
        self.stack = Stack(
            config,
            config.num_layers,
            causal=config.architecture != "encoder",
            cross=config.architecture == "encoder-decoder",
        )
        self.lm_head = None if config.tie_embeddings else Linear(config.d_model, config.vocab_size, bias=False)
        if not self.embedding.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, by generator or torch's global one.

        | parameter                                | initial values                                              |
        |------------------------------------------|-------------------------------------------------------------|
        | embeddings, learned positions, T5 table  | normal(0, init_std)                                         |
        | embeddings under scale_embedding         | normal(0, 1 / sqrt(d_model)): unit variance once scaled     |
        | linear layers, output layer              | normal(0, init_std)                                         |
        | those that write to the residual stream: | normal(0, init_std / sqrt(n)), n their number in the stack: |
        | o_proj, down_proj                        | GPT-2's 1 / sqrt(2 num_layers)                              |
        | biases                                   | 0                                                           |
        | norms                                    | weight 1, bias 0                                            |
        """
        std = self.config.init_std

        def draw(weight: Tensor, std: float) -> None:
            nn.init.normal_(weight, std=std, generator=generator)

        for module in self.modules():
            if isinstance(module, Embedding):
                draw(module.weight, self.config.d_model**-0.5 if self.config.scale_embedding else std)
            elif isinstance(module, (nn.Embedding, nn.Linear)):
                draw(module.weight, std)
            elif isinstance(module, Norm):
                module.weight.fill_(1.0)
            if getattr(module, "bias", None) is not None and isinstance(module, (nn.Linear, Norm)):
                module.bias.zero_()
        for stack in filter(None, (self.encoder, self.stack)):
            writers = [module for name, module in stack.named_modules() if name.endswith(RESIDUAL_WRITERS)]
            for module in writers:
                draw(module.weight, std / math.sqrt(len(writers)))

    def forward(
        self,
        tokens: Tensor,
        *,
        source: Tensor | None = None,
        source_lengths: Tensor | None = None,
        memory: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        cache: AttentionCache | None = None,
    ) -> Tensor:
        """Return the hidden states after the final norm, (B, T, C) in compute_dtype.

        tokens: (B, T) int64. positions: (T,), or (B, T) where rows differ, int64; 0, 1, ... if None.
        lengths: (B,) integers, tokens per row; an encoder hides the padding behind them, a decoder does so by being
        causal. What is returned at padding means nothing.
        cu_seqlens: (number of documents + 1,) int32 offsets into the B * T tokens read row after row: documents that
        do not see each other. Then positions, (B, T), restart with each, and none may be longer than T.
        cache: tokens follow those it holds, at positions the caller gives (nn.attention.AttentionCache).
        source: (B, S) int64, source_lengths: (B,): what an encoder-decoder translates. memory: encode(source,
        source_lengths) if the caller has it already, in place of source. With a cache, the cross-attention keys and
        values are computed at the first call and memory is not read again.
        Raises ValueError for arguments that do not fit together.
        """
        if (source is not None or memory is not None) != (self.encoder is not None):
            raise ValueError(
                f"an encoder-decoder needs source or memory, other models take neither; this model is a "
                f"{self.config.architecture}"
            )
        if cu_seqlens is not None and (lengths is not None or cache is not None or self.encoder is not None):
            raise ValueError("cu_seqlens excludes lengths, cache and source: packed documents are for training")
        if self.config.position == "learned" and tokens.shape[1] > self.config.max_seq_len:
            raise ValueError(
                f"tokens must be (B, T) with T at most max_seq_len {self.config.max_seq_len}, got {tuple(tokens.shape)}"
            )
        if source is not None:
            memory = self.encode(source, source_lengths)
        shape = tokens.shape
        if positions is None:
            positions = torch.arange(shape[1], device=tokens.device)
        if cu_seqlens is not None:
            tokens, positions = tokens.view(1, -1), positions.expand(shape).reshape(1, -1)
        hidden = self.stack(
            self.embedding(tokens),
            dtype=self.compute_dtype,
            positions=positions,
            window=shape[1],
            key_lengths=None if self.stack.causal else lengths,
            cu_seqlens=cu_seqlens,
            cache=cache,
            memory=memory,
            memory_lengths=source_lengths,
            recompute=self.gradient_checkpointing,
        )
        return hidden.view(*shape, -1)
