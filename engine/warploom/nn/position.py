"""How the order of tokens enters a transformer: added to the embedding, as a rotation of queries and keys, or as a bias
on attention. Every kind has the same three methods, and does nothing in those it does not need.

No kind keeps a buffer: what is computed from positions is computed at use, so that a model built on the meta device
lacks nothing but its parameters.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
from torch import Tensor

from warploom.ops.rotary import rotary


class NoPosition(nn.Module):
    """Adds nothing, rotates nothing; order is seen through the causal mask alone (and in an encoder not at all)."""

    max_seq_len: int | None = None
    """Positions from here on do not exist."""

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """Add positions (T,) or (B, T) to token embeddings x (B, T, C)."""
        return x

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn queries or keys x (B, H, T, D) by their positions (T,) or (B, T)."""
        return x

    def bias(self, positions: Tensor, num_keys: int) -> Tensor | None:
        """Return what is added to the attention logits of the queries at positions (T,) or (B, T), consecutive, for
        the keys at 0, 1, ..., num_keys - 1, in float32, or None. For (T,) it is the bias by distance of ops.attention,
        (H, T + num_keys - 1); for (B, T) each row has its own distances, and it is (B, H, T, num_keys)."""
        return None


class SinusoidalPosition(NoPosition):
    """Adds sin(p w) and cos(p w) for d_model / 2 frequencies w from 1 down to 1 / 10000 (Vaswani et al., 2017).

    The sines fill the first half of the features and the cosines the second, as in the authors' code; the paper's
    formula interleaves them, which is the same up to the order of features.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        index = torch.arange(0, self.d_model, 2, device=positions.device, dtype=torch.float32)
        angles = positions[..., None] * torch.exp(index * (-math.log(10000.0) / self.d_model))  # (..., T, C / 2)
        return x + torch.cat([angles.sin(), angles.cos()], dim=-1).to(x.dtype)


class LearnedPosition(NoPosition):
    """Adds row p of a learned table."""

    def __init__(self, max_seq_len: int, d_model: int) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.table = nn.Embedding(max_seq_len, d_model)

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + self.table(positions)


class RotaryPosition(NoPosition):
    """Turns pairs of features of queries and keys by p base^(-2 i / D) (Su et al., 2021)."""

    def __init__(self, base: float = 10000.0) -> None:
        super().__init__()
        self.base = base

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return rotary(x, positions, self.base)


class AlibiPosition(NoPosition):
    """Adds -slope |query position - key position| to the attention logits, one slope per head (Press et al., 2022).

    Slopes fall geometrically from 2^(-8 / H) to 2^-8. If H is no power of two, they are those of the power of two
    below, followed by every other slope of the power of two above.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.heads = slice(None)  # those of this process, where heads are shared out

    def slopes(self, device: torch.device) -> Tensor:
        """(H,) float32, of the heads in self.heads."""
        power = 2 ** int(math.log2(self.num_heads))
        main = torch.arange(1, power + 1, device=device) * (-8 / power)
        extra = (2 * torch.arange(self.num_heads - power, device=device) + 1) * (-4 / power)
        return torch.cat([main, extra]).exp2()[self.heads]

    def bias(self, positions: Tensor, num_keys: int) -> Tensor:
        distance = _relative_position(positions, num_keys).abs()
        slopes = self.slopes(positions.device)
        return -slopes.view(-1, *(1,) * positions.dim()) * distance.unsqueeze(-1 - positions.dim())


class BucketPosition(NoPosition):
    """Adds a learned number per head and bucket of distances to the attention logits (T5, Raffel et al., 2020).

    Half of the buckets hold one distance each; the others grow geometrically up to max_distance, and the last holds
    all beyond. bidirectional: keys before and after the query get half of the buckets each, for encoders; otherwise
    keys after the query, which a causal mask hides, fall in bucket 0.
    """

    def __init__(self, num_heads: int, bidirectional: bool, num_buckets: int = 32, max_distance: int = 128) -> None:
        super().__init__()
        self.bidirectional = bidirectional
        self.max_distance = max_distance
        self.table = nn.Embedding(num_buckets, num_heads)

    def bias(self, positions: Tensor, num_keys: int) -> Tensor:
        biases = self.table(self._bucket(_relative_position(positions, num_keys)))
        return biases.movedim(-1, -1 - positions.dim()).float()

    def _bucket(self, relative: Tensor) -> Tensor:
        num_buckets = self.table.num_embeddings
        first = torch.zeros_like(relative)
        distance = (-relative).clamp(min=0)
        if self.bidirectional:
            num_buckets //= 2
            first = (relative > 0) * num_buckets
            distance = relative.abs()
        exact = num_buckets // 2
        # clamp keeps the logarithm of distance 0 finite; those distances take the exact bucket.
        octaves = torch.log(distance.clamp(min=1) / exact) / math.log(self.max_distance / exact)
        coarse = exact + (octaves * (num_buckets - exact)).long()
        return first + torch.where(distance < exact, distance, coarse.clamp(max=num_buckets - 1))


def _relative_position(positions: Tensor, num_keys: int) -> Tensor:
    """Key position - query position: for positions (B, T) of each pair, (B, T, num_keys); for (T,), which are
    consecutive, of each distance between a query and a key, (T + num_keys - 1,)."""
    if positions.dim() == 2:
        return torch.arange(num_keys, device=positions.device) - positions[..., None]
    T = positions.shape[0]
    return torch.arange(1 - T, num_keys, device=positions.device) - positions[0]
