"""A training step as one writes it first, in plain torch, a part at a time: what `warploom ladder` starts from.

Each part takes the place of a module of the engine and works on the same parameters, so any mixture of the two is the
same model. Each is right; what it costs is memory traffic, kernels and copies that the engine does without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from warploom.models.transformer import Transformer
from warploom.nn.attention import AttentionContext, SelfAttention
from warploom.nn.feed_forward import FeedForward
from warploom.nn.linear import Linear
from warploom.nn.norm import LayerNorm
from warploom.train.batches import Batch


class NaiveNorm(nn.Module):
    """LayerNorm by its formula: each operation reads and writes the whole tensor."""

    def __init__(self, norm: LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        stream = x if residual is None else residual + x
        wide = stream.float()
        centered = wide - wide.mean(-1, keepdim=True)
        y = centered / (centered.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype), stream


class NaiveAttention(nn.Module):
    """Causal attention, head after head, with the whole matrix of scores in memory."""

    def __init__(self, attention: SelfAttention) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = attention.q_proj, attention.k_proj, attention.v_proj
        self.o_proj, self.head_dim = attention.o_proj, attention.head_dim

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        T = x.shape[1]
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        heads = []
        for q, k, v in zip(
            *(proj(x).split(self.head_dim, -1) for proj in (self.q_proj, self.k_proj, self.v_proj)), strict=True
        ):
            scores = q @ k.mT / math.sqrt(self.head_dim)  # (B, T, T)
            heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v)
        return self.o_proj(torch.cat(heads, -1))


class NaiveFeedForward(nn.Module):
    """Two products, and a pass over memory for the ReLU between them."""

    def __init__(self, feed_forward: FeedForward) -> None:
        super().__init__()
        self.up_proj, self.down_proj = feed_forward.up_proj, feed_forward.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(x)))


class NaiveLinear(nn.Module):
    """torch's product, with the float32 weight cast anew at each use."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


# Part -> module of the engine -> what takes its place.
PARTS: dict[str, dict[type[nn.Module], Callable[..., nn.Module]]] = {
    "norm": {LayerNorm: NaiveNorm},
    "attention": {SelfAttention: NaiveAttention},
    "linear": {FeedForward: NaiveFeedForward, Linear: NaiveLinear},
}


def make_naive(model: Transformer, parts: Iterable[str]) -> None:
    """Put the naive form of each part, by its name in PARTS, into the model; its parameters stay the same objects."""
    for part in parts:
        for kind, naive in PARTS[part].items():
            for parent in list(model.modules()):
                for name, child in list(parent.named_children()):
                    if type(child) is kind:
                        setattr(parent, name, naive(child))


def naive_loss(model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats, from the logits of the whole batch at once."""
    log_probabilities = model.logits(model(tokens)).float().log_softmax(-1)  # (B, T, V)
    return -log_probabilities.gather(-1, targets[..., None]).mean()


def naive_step(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    batch: Batch,
    parameters: list[nn.Parameter],
    optimizer: Optimizer,
    *,
    grad_clip: float,
) -> float:
    """Make one update from the mean loss, as train.step.training_step does; return the loss."""
    optimizer.zero_grad()
    loss = loss_of(batch.tokens, batch.targets)
    loss.backward()
    clip_grad_norm_(parameters, grad_clip, foreach=False)
    optimizer.step()
    return loss.item()
