"""From logits to the next token: repetition penalty, temperature, top-k, top-p, min-p, on rows (B, V)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from warploom.errors import UserError


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn, and when to stop."""

    temperature: float = 0.8
    """Divides the logits, 0 to 2; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Keep the k likeliest tokens; None keeps all."""
    top_p: float | None = None
    """Keep the smallest set of likeliest tokens whose probabilities reach p, 0 < p <= 1 (nucleus); None keeps all."""
    min_p: float | None = None
    """Keep tokens at least this fraction as likely as the likeliest, 0 to 1; None keeps all."""
    repetition_penalty: float = 1.0
    """Tokens already present have positive logits divided and negative ones multiplied by this; 1 does nothing."""
    stop: tuple[str, ...] = ()
    """Strings that end a sample; the text is cut before them."""
    max_new_tokens: int = 200
    """Longest continuation, tokens."""
    num_samples: int = 1
    """Continuations per prompt."""
    seed: int = 0
    """Each sample has a random stream of its own, from this seed, its prompt's place and its number."""
    use_cache: bool = True
    """Keep keys and values of past tokens; without it each step recomputes them, with the same result."""

    def __post_init__(self) -> None:
        def require(fine: bool, name: str, range_: str) -> None:
            if not fine:
                raise UserError(f"{name} is {getattr(self, name)}; it must be {range_}")

        require(0.0 <= self.temperature <= 2.0, "temperature", "between 0 (greedy) and 2")
        require(self.top_k is None or self.top_k >= 1, "top_k", "at least 1")
        require(self.top_p is None or 0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1")
        require(self.min_p is None or 0.0 <= self.min_p <= 1.0, "min_p", "between 0 and 1")
        require(0.0 < self.repetition_penalty < float("inf"), "repetition_penalty", "a positive number")
        require("" not in self.stop, "stop", "made of strings that are not empty")
        require(self.max_new_tokens >= 1, "max_new_tokens", "at least 1")
        require(self.num_samples >= 1, "num_samples", "at least 1")


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens marked in seen (B, V) bool less likely (Keskar et al., 2019)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def probabilities(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Turn logits (B, V) into the float32 distribution (B, V) that is drawn from, for a temperature above 0.

    top_k, top_p and min_p each look at the tempered distribution and a token must pass all three; the likeliest passes
    always. Ties at the border of top_k go to the lower token id.
    """
    probs = torch.softmax(logits.float() / config.temperature, dim=-1)
    if config.top_k is None and config.top_p is None and config.min_p is None:
        return probs
    ordered, ids = probs.sort(dim=-1, descending=True, stable=True)  # (B, V)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if config.top_k is not None:
        keep[:, config.top_k :] = False
    if config.top_p is not None:
        # A token stays if those before it have not reached p yet.
        keep &= ordered.cumsum(-1) - ordered < config.top_p
    if config.min_p is not None:
        keep &= ordered >= config.min_p * ordered[:, :1]
    keep[:, 0] = True
    kept = torch.where(keep, ordered, 0.0)
    return torch.zeros_like(probs).scatter_(-1, ids, kept / kept.sum(-1, keepdim=True))


def draw(probs: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Draw one token per row of probs (B, V); returns (B,) int64. Row b uses generators[b] alone, so that what a row
    draws does not depend on the rows beside it."""
    uniform = torch.stack([torch.rand((), generator=generator) for generator in generators])
    cumulative = probs.double().cumsum(-1)
    # uniform < 1, so the threshold stays under the total, and the token found has a probability above 0.
    threshold = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0]
