"""Transformer: embedding, one or two stacks of blocks, output layer. One device, no logging, no I/O.

Names in the state_dict, fixed because checkpoints hold them:

    embedding.weight                          (vocab_size, C)
    source_embedding.weight                   (source_vocab_size, C), only where the source has its own vocabulary
    {stack}.position.table.weight             learned positions (max_seq_len, C) or T5 buckets (num_buckets, H)
    {stack}.blocks.{i}.{attention,cross_attention}.{q,k,v,o}_proj.{weight,bias}
    {stack}.blocks.{i}.feed_forward.{gate,up,down}_proj.{weight,bias}
    {stack}.blocks.{i}.{attention,cross_attention,feed_forward}_norm.{weight,bias}
    {stack}.embedding_norm.{weight,bias}      only with embedding_norm
    {stack}.norm.{weight,bias}                pre-norm only
    lm_head.weight                            (vocab_size, C), untied only
    output_bias                               (vocab_size,), only with output_bias

{stack} is `stack` for the tokens the model predicts, and `encoder` for the source of an encoder-decoder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from warploom.models.blocks import EMBEDDING_NORMS, FINAL_NORMS, POSITIONS, build_block
from warploom.models.config import TransformerConfig
from warploom.models.recompute import run_block
from warploom.nn.attention import AttentionCache, AttentionContext
from warploom.nn.embedding import Embedding
from warploom.nn.linear import Linear, parameters_for
from warploom.nn.norm import Norm
from warploom.ops.linear import linear
from warploom.ops.linear_cross_entropy import ClassShard, linear_cross_entropy

# The last module of each sub-layer: what it returns is added to the residual stream.
RESIDUAL_WRITERS = ("o_proj", "down_proj")


class Stack(nn.Module):
    """Positions, blocks and final norm. causal: no token sees a later one. cross: blocks read an encoded source.

    begins, ends: whether embedded tokens come in and normalised states go out, or those in between, where the blocks
    of a stack are shared by several processes.
    """

    begins = ends = True

    def __init__(self, config: TransformerConfig, num_layers: int, causal: bool, cross: bool) -> None:
        super().__init__()
        self.causal = causal
        self.position = POSITIONS[config.position](config, causal)
        self.embedding_norm = EMBEDDING_NORMS[config.embedding_norm](config)
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
    ) -> Tensor:
        """Return the hidden states (B, T, C) in dtype of the embedded tokens x (B, T, C).

        window: the length of the longest document, or more. The rest is as in Transformer.forward.
        """
        T = x.shape[1]
        # Without a cache only distances within a document matter to a bias, and those are distances of indices.
        if cache is None:
            bias = self.position.bias(torch.arange(window, device=x.device), window)
        else:
            bias = self.position.bias(positions, cache.num_keys(T))
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
        if self.begins:
            x = self.dropout(self.embedding_norm(self.position.embed(x, positions).to(dtype), None)[0])
        stream = None
        for block in self.blocks:
            x, stream = run_block(block, x, stream, context)
        return self.norm(x, stream)[0]


class Transformer(nn.Module):
    """The model a TransformerConfig describes, with random weights (see init_weights; none on the meta device).

    compute_dtype: dtype of the activations, float32 at first. Parameters stay as they are and are cast where they are
    used. What blocks keep for the backward pass, all at first, is models.recompute's to set.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.class_shard: ClassShard | None = None  # set where other processes hold the rest of the vocabulary
        scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        self.embedding = Embedding(config.vocab_size, config.d_model, scale=scale)
        self.source_embedding: Embedding | None = None
        self.encoder: Stack | None = None
        if config.architecture == "encoder-decoder":
            if config.source_vocab_size is not None:
                self.source_embedding = Embedding(config.source_vocab_size, config.d_model, scale=scale)
            self.encoder = Stack(config, config.encoder_layers, causal=False, cross=False)
        self.stack = Stack(
            config,
            config.num_layers,
            causal=config.architecture != "encoder",
            cross=config.architecture == "encoder-decoder",
        )
        self.lm_head = None if config.tie_embeddings else Linear(config.d_model, config.vocab_size, bias=False)
        self.output_bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.output_bias else None
        if not self.embedding.weight.is_meta:
            self.init_weights()

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
        residual_std = {}
        for stack in filter(None, (self.encoder, self.stack)):
            writers = [module for name, module in stack.named_modules() if name.endswith(RESIDUAL_WRITERS)]
            residual_std.update(dict.fromkeys(writers, std / math.sqrt(len(writers))))
        for module in self.modules():
            if isinstance(module, Norm):
                nn.init.ones_(module.weight)
            elif isinstance(module, Embedding) and self.config.scale_embedding:
                nn.init.normal_(module.weight, std=self.config.d_model**-0.5, generator=generator)
            elif isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=residual_std.get(module, std), generator=generator)
            bias = getattr(module, "bias", None)
            if isinstance(bias, nn.Parameter):
                nn.init.zeros_(bias)
        if self.output_bias is not None:
            nn.init.zeros_(self.output_bias)

    def forward(
        self,
        tokens: Tensor,
        *,
        embedded: Tensor | None = None,
        source: Tensor | None = None,
        source_lengths: Tensor | None = None,
        memory: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        cache: AttentionCache | None = None,
    ) -> Tensor:
        """Return the hidden states after the final norm, (B, T, C) in compute_dtype.

        tokens: (B, T) int64. embedded: embedding(tokens), (B, T, C), if the caller has it already. positions: (T,) or
        (B, T) int64, consecutive within a document; 0, 1, ... if None.
        lengths: (B,) integers, tokens per row; an encoder hides the padding behind them, a decoder does so by being
        causal. What is returned at padding means nothing.
        cu_seqlens: (number of documents + 1,) int32 offsets into the B * T tokens read row after row: documents that
        do not see each other. Then positions, (B, T), restart with each, and none may be longer than T.
        cache: tokens follow those it holds, at positions that the caller gives, each row counted from its first key
        (nn.attention.AttentionCache).
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
        if cu_seqlens is not None and positions is None:
            raise ValueError("cu_seqlens needs the positions of the packed tokens, got None")
        limit = self.stack.position.max_seq_len
        if limit is not None and tokens.shape[1] > limit:
            raise ValueError(f"tokens must be at most {limit} long, the learned positions; got {tuple(tokens.shape)}")
        if source is not None:
            memory = self.encode(source, source_lengths)
        shape = tokens.shape
        if positions is None:
            positions = torch.arange(shape[1], device=tokens.device)
        if embedded is None:
            embedded = self.embedding(tokens)
        if cu_seqlens is not None:
            embedded, positions = embedded.reshape(1, -1, embedded.shape[-1]), positions.reshape(1, -1)
        hidden = self.stack(
            embedded,
            dtype=self.compute_dtype,
            positions=positions,
            window=shape[1],
            key_lengths=None if self.stack.causal else lengths,
            cu_seqlens=cu_seqlens,
            cache=cache,
            memory=memory,
            memory_lengths=source_lengths,
        )
        return hidden.view(*shape, -1)

    def encode(self, source: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """Return the memory (B, S, C) of the source (B, S), for forward's memory. Encoder-decoder only."""
        if self.encoder is None:
            raise ValueError(f"only an encoder-decoder encodes a source; this model is a {self.config.architecture}")
        embedding = self.embedding if self.source_embedding is None else self.source_embedding
        S = source.shape[1]
        return self.encoder(
            embedding(source),
            dtype=self.compute_dtype,
            positions=torch.arange(S, device=source.device),
            window=S,
            key_lengths=source_lengths,
        )

    @property
    def output_weight(self) -> Tensor:
        """(V, C): the weight of the output layer, which is the token embedding's if they are tied."""
        return self.embedding.weight if self.lm_head is None else self.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the next-token logits (..., V) of hidden states (..., C), in their dtype."""
        return linear(hidden, *parameters_for(hidden, self.output_weight, self.output_bias))

    def loss(
        self, tokens: Tensor, targets: Tensor, *, reduction: Literal["mean", "sum"] = "mean", **arguments: Any
    ) -> Tensor:
        """Return the cross-entropy of targets (B, T) in nats, a float32 scalar; targets of -100 do not count.

        arguments: those of forward. The logits of the whole batch are never held at once.
        """
        embedded, output_weight = None, self.output_weight
        if self.lm_head is None:
            embedded, output_weight = self.embedding.with_weight(tokens)
        hidden = self(tokens, embedded=embedded, **arguments)
        return linear_cross_entropy(*self._with_output_bias(hidden, output_weight), targets, reduction=reduction)

    def loss_of(self, hidden: Tensor, targets: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        """Return the loss of targets (B, T) from the hidden states (B, T, C) that forward returns.

        The one to call where the weights lie in parts on several processes: it asks for the output layer's when the
        forward pass has gathered them.
        """
        hidden, weight = self._with_output_bias(hidden, self.output_weight)
        return linear_cross_entropy(hidden, weight, targets, reduction=reduction, shard=self.class_shard)

    def _with_output_bias(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The operands of the output layer's product; the op has no bias, so a feature that is always 1 carries it."""
        if self.output_bias is None:
            return hidden, weight
        return F.pad(hidden, (0, 1), value=1.0), torch.cat([weight, self.output_bias[:, None]], dim=1)

    def num_parameters(self) -> int:
        """Return the number of parameters; a weight that is used twice counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, seq_len: int) -> int:
        """Return the floating-point operations that training spends per token, forward and backward.

        Only matrix products count, at 2 per multiply-add, and the backward pass costs twice the forward:
        6 per weight of each linear layer and of the output layer (an embedding is a look-up: none), and for attention
        12 H D per layer and key seen (q k^T and p v). A token sees seq_len keys, in causal attention half as many.
        A frozen weight has no gradient of its own and costs 4; blocks below the first one with anything that is
        trained are only run forward, a third of all. Recomputation under gradient checkpointing is not work that
        training needs, so it does not count. Encoder-decoder: per token of the target, with a source as long as the
        target.
        """
        flops, trains = 0.0, False
        for stack in (self.encoder, self.stack):
            if stack is None:
                continue
            keys = seq_len / 2 if stack.causal else seq_len
            if stack is not self.encoder and self.encoder is not None:
                keys += seq_len  # cross-attention
            embedding = self.source_embedding if stack is self.encoder else self.embedding
            trains |= _is_trained(embedding or self.embedding, stack.position, stack.embedding_norm)
            for block in stack.blocks:
                trains |= _is_trained(block)
                flops += sum(_product_flops(weight, trains) for weight in _product_weights(block))
                flops += 4 * self.config.num_heads * self.config.head_width * keys * (3 if trains else 1)
            trains |= _is_trained(stack.norm)
        return int(flops + _product_flops(self.output_weight, trains))


def _is_trained(*modules: nn.Module) -> bool:
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())


def _product_weights(block: nn.Module) -> Iterator[nn.Parameter]:
    """The matrices of a block's linear layers, an adapter's factors among them."""
    for module in block.modules():
        if isinstance(module, nn.Linear):
            yield from (weight for weight in module.parameters(recurse=False) if weight.dim() == 2)


def _product_flops(weight: Tensor, trains: bool) -> int:
    """Per token: forward 2 per weight, 2 for the gradient that goes on below, 2 for that of the weight."""
    return weight.numel() * (2 + 2 * trains + 2 * weight.requires_grad)
