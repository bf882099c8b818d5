"""Beam search for encoder-decoder models: the likeliest target of a source, rather than one drawn at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from warploom.errors import UserError
from warploom.generate.cache import KeyValueCache
from warploom.models.transformer import Transformer


@dataclass(frozen=True)
class Hypothesis:
    """A finished target."""

    tokens: list[int]  # without the begin and end tokens
    score: float  # log-probability over length ** length_penalty, the end token counted


@torch.no_grad()
def beam_search(
    model: Transformer,
    source: Tensor,
    source_lengths: Tensor,
    *,
    num_beams: int,
    max_new_tokens: int,
    bos_id: int,
    eos_id: int,
    length_penalty: float = 1.0,
) -> list[list[Hypothesis]]:
    """Return up to num_beams hypotheses per source, best first.

    source: (B, S) int64, right-padded; source_lengths: (B,). Each step extends every live beam by every token and keeps
    the num_beams likeliest; one that ends leaves the beam, and a source is done when num_beams have ended. Beams cut at
    max_new_tokens or at the model's context fill the list where too few ended. length_penalty 0 compares whole
    log-probabilities, 1 means per token. num_beams 1 is greedy.
    Raises UserError for num_beams below 1.
    """
    if num_beams < 1:
        raise UserError(f"num_beams is {num_beams}; it must be at least 1")
    was_training = model.training
    model.eval()
    try:
        steps = min(max_new_tokens, model.config.max_seq_len - 1)
        searches = [_Search(num_beams, length_penalty) for _ in range(source.shape[0])]
        B, device = source.shape[0], source.device
        beams = torch.arange(B, device=device).repeat_interleave(num_beams)  # (B * num_beams,)
        memory, source_lengths = model.encode(source, source_lengths)[beams], source_lengths[beams]
        tokens = torch.full((B * num_beams, 1), bos_id, device=device)
        # All beams of a source start alike, so only the first may be extended in the first step.
        scores = torch.full((B, num_beams), -torch.inf, device=device)
        scores[:, 0] = 0.0
        cache = KeyValueCache(torch.ones(B * num_beams, dtype=torch.int64, device=device), steps + 1)
        for step in range(steps):
            positions = torch.full((B * num_beams, 1), step, device=device)
            hidden = model(
                tokens[:, -1:], positions=positions, cache=cache, memory=memory, source_lengths=source_lengths
            )
            cache.advance()
            log_probs = model.logits(hidden[:, 0].float()).log_softmax(-1)  # (B * num_beams, V)
            V = log_probs.shape[-1]
            totals = (scores.view(-1, 1) + log_probs).view(B, num_beams * V)
            # Of 2 * num_beams candidates at most num_beams end, so num_beams remain to go on.
            best, flat = totals.topk(min(2 * num_beams, num_beams * V), dim=-1)
            keep, tails, scores = [], [], torch.full_like(scores, -torch.inf)
            for b, search in enumerate(searches):
                live = search.step(best[b].tolist(), flat[b].tolist(), V, eos_id, tokens[b * num_beams :, 1:], step)
                for slot, (score, beam, token) in enumerate(live):
                    scores[b, slot] = score
                    keep.append(b * num_beams + beam)
                    tails.append(token)
            rows = torch.tensor(keep, device=device)
            tokens = torch.cat([tokens[rows], torch.tensor(tails, device=device)[:, None]], dim=1)
            cache.select(rows)
            if all(search.done for search in searches):
                break
        for b, search in enumerate(searches):
            search.cut(scores[b].tolist(), tokens[b * num_beams : (b + 1) * num_beams, 1:].tolist())
        return [search.best() for search in searches]
    finally:
        model.train(was_training)


class _Search:
    """The hypotheses of one source."""

    def __init__(self, num_beams: int, length_penalty: float) -> None:
        self.done = False
        self._num_beams = num_beams
        self._length_penalty = length_penalty
        self._ended: list[Hypothesis] = []

    def step(
        self, scores: list[float], flat: list[int], V: int, eos_id: int, tokens: Tensor, step: int
    ) -> list[tuple[float, int, int]]:
        """Sort candidates, best first, into ended hypotheses and num_beams (score, beam, token) that go on."""
        live: list[tuple[float, int, int]] = []
        for rank, (score, index) in enumerate(zip(scores, flat, strict=True)):
            beam, token = divmod(index, V)
            if token == eos_id:
                # An end outside the num_beams likeliest would not have survived as a beam either.
                if rank < self._num_beams and not self.done:
                    self._ended.append(Hypothesis(tokens[beam].tolist(), self._normalised(score, step + 1)))
            elif len(live) < self._num_beams:
                live.append((score, beam, token))
        live += [(-torch.inf, 0, eos_id)] * (self._num_beams - len(live))
        self.done = len(self._ended) >= self._num_beams
        return live

    def cut(self, scores: list[float], tokens: list[list[int]]) -> None:
        """No step is left: take live beams where too few hypotheses ended."""
        if not self.done:
            for score, beam in zip(scores, tokens, strict=True):
                if score > -torch.inf and len(self._ended) < self._num_beams:
                    self._ended.append(Hypothesis(beam, self._normalised(score, len(beam))))

    def best(self) -> list[Hypothesis]:
        return sorted(self._ended, key=lambda h: -h.score)[: self._num_beams]

    def _normalised(self, score: float, length: int) -> float:
        return score / length**self._length_penalty
