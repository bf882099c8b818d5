"""The CPU quick start of a well-known minimal trainer in plain torch, as a careful user writes it: a character model of
4 layers, 4 heads, width 128 and context 64, trained on 2000 batches of 12 by AdamW in float32. The yardstick of
bench.quality."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

IGNORE_INDEX = -100
_EVAL_ROWS = 64


@dataclass(frozen=True)
class Recipe:
    """The published settings. Dropout is 0, so there is none."""

    num_layers: int = 4
    num_heads: int = 4
    d_model: int = 128
    seq_len: int = 64
    batch_size: int = 12
    iterations: int = 2000
    lr: float = 1e-3
    min_lr: float = 1e-4
    warmup: int = 100
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    grad_clip: float = 1.0

    def lr_at(self, iteration: int) -> float:
        """Linear warm-up, then a cosine down to min_lr at the last iteration."""
        if iteration < self.warmup:
            return self.lr * (iteration + 1) / (self.warmup + 1)
        progress = (iteration - self.warmup) / max(1, self.iterations - self.warmup)
        return self.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (self.lr - self.min_lr)


class Block(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        C = recipe.d_model
        self.num_heads = recipe.num_heads
        self.attention_norm = nn.LayerNorm(C, bias=False)
        self.qkv_proj = nn.Linear(C, 3 * C, bias=False)
        self.o_proj = nn.Linear(C, C, bias=False)
        self.feed_forward_norm = nn.LayerNorm(C, bias=False)
        self.up_proj = nn.Linear(C, 4 * C, bias=False)
        self.down_proj = nn.Linear(4 * C, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv_proj(self.attention_norm(x)).view(B, T, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(o.transpose(1, 2).reshape(B, T, C))
        return x + self.down_proj(F.gelu(self.up_proj(self.feed_forward_norm(x))))


class CharModel(nn.Module):
    """Decoder-only, pre-norm LayerNorm, learned positions, GELU, no biases, tied embeddings, initialised as GPT-2."""

    def __init__(self, vocab_size: int, recipe: Recipe) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, recipe.d_model)
        self.position = nn.Embedding(recipe.seq_len, recipe.d_model)
        self.blocks = nn.ModuleList(Block(recipe) for _ in range(recipe.num_layers))
        self.norm = nn.LayerNorm(recipe.d_model, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes_stream = "o_proj" in name or "down_proj" in name
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * recipe.num_layers) if writes_stream else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)  # (B, T, V)

    def loss_sum(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Sum of the losses of the targets that are not IGNORE_INDEX, nats."""
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten(), reduction="sum")


@dataclass(frozen=True)
class CharWindows:
    """tokens and targets, (B, T) int64, and the UTF-8 bytes of text behind the targets that count."""

    tokens: Tensor
    targets: Tensor
    num_bytes: int


class Characters:
    """Character <-> number, for the characters of a text."""

    def __init__(self, text: str) -> None:
        self.characters = sorted(set(text))
        self._ids = {character: i for i, character in enumerate(self.characters)}

    def encode(self, text: str) -> Tensor:
        return torch.tensor([self._ids[character] for character in text], dtype=torch.int64)

    def windows(self, before: str, text: str, seq_len: int) -> Iterator[CharWindows]:
        """Yield text as windows that do not overlap, each of its characters a target once; the first is predicted from
        the last character of what stands before it."""
        ids = self.encode(before[-1] + text)
        rows = range(0, len(text), seq_len)
        for first in range(0, len(rows), _EVAL_ROWS):
            starts = rows[first : first + _EVAL_ROWS]
            tokens = torch.zeros(len(starts), seq_len, dtype=torch.int64)
            targets = torch.full((len(starts), seq_len), IGNORE_INDEX)
            for row, start in enumerate(starts):
                length = min(seq_len, len(text) - start)
                tokens[row, :length] = ids[start : start + length]
                targets[row, :length] = ids[start + 1 : start + length + 1]
            yield CharWindows(tokens, targets, len(text[starts[0] : starts[-1] + seq_len].encode()))


class CharTrainer:
    """Trains the recipe on a text and keeps the time that takes, without anything done between steps."""

    def __init__(self, text: str, characters: Characters, recipe: Recipe, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.recipe, self.iteration, self.train_s = recipe, 0, 0.0
        self._ids = characters.encode(text)
        self.model = CharModel(len(characters.characters), recipe)
        matrices = [p for p in self.model.parameters() if p.dim() == 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        groups: Sequence[dict] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(
            groups, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
        )
        self._offsets = torch.arange(recipe.seq_len)

    def step(self) -> float:
        """Make one step; return its loss."""
        recipe = self.recipe
        started = time.perf_counter()
        for group in self._optimizer.param_groups:
            group["lr"] = recipe.lr_at(self.iteration)
        starts = torch.randint(len(self._ids) - recipe.seq_len, (recipe.batch_size, 1))
        window = starts + self._offsets  # (B, T)
        loss = self.model.loss_sum(self._ids[window], self._ids[window + 1]) / window.numel()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip_grad_norm_(self.model.parameters(), recipe.grad_clip)
        self._optimizer.step()
        self.iteration += 1
        self.train_s += time.perf_counter() - started
        return float(loss.detach())
