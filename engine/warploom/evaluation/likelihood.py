"""How likely a model finds a continuation after a context: batches of equal shape, each shared context read once.

Work is saved in three places. What many contexts begin with (the examples of a few-shot prompt) is read once for all
of them; a context that several continuations follow is read once for these; and the first token of a continuation
comes from the pass that reads its context, so that choices of one token, such as letters, need no other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from warploom.errors import UserError
from warploom.generate.cache import PrefixCache
from warploom.generate.sampler import pad_right
from warploom.models.transformer import Transformer

# Tokens in common from which on a beginning is looked at, and tokens not read again from which on it has a pass.
_MIN_SHARED = 32
_MIN_SAVED = 256
_LOGIT_ROWS = 256  # scored at a time: their logits over a vocabulary of 50,000 words take 50 MB


@dataclass(frozen=True)
class Request:
    """A continuation to score after a context; both are token ids, at least one each."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    log_prob: float
    """Of the whole continuation, nats."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest at its place."""


@torch.no_grad()
def log_likelihoods(
    model: Transformer, requests: Sequence[Request], *, max_tokens: int = 8192
) -> Iterator[tuple[int, Likelihood]]:
    """Yield (index of the request, its likelihood), in the order of the work and not of the requests.

    A context is cut on the left where the model's context is too short for it. max_tokens: tokens held in one pass,
    those that were read before included. The model must be a decoder in evaluation mode. Raises UserError for a
    continuation that is itself longer than the model's context.
    """
    if model.config.architecture != "decoder":
        raise UserError(f"the model is a {model.config.architecture}; only a decoder is scored on continuations")
    by_context: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
    for index, request in enumerate(requests):
        room = model.config.max_seq_len - len(request.continuation) + 1
        if room < 1:
            raise UserError(
                f"a continuation has {len(request.continuation)} tokens and the model's context is "
                f"{model.config.max_seq_len}; it cannot be scored"
            )
        by_context.setdefault(request.context[-room:], []).append((index, request.continuation))
    contexts = [_Context(ids, continuations) for ids, continuations in by_context.items()]
    for family in _families(contexts):
        yield from _Pass(model, family, max_tokens).run()


@dataclass(frozen=True)
class _Context:
    ids: tuple[int, ...]
    continuations: list[tuple[int, tuple[int, ...]]]  # (index of the request, token ids)

    @property
    def is_read_once(self) -> bool:
        """Whether all continuations are of one token, so that nothing is read after the context."""
        return all(len(ids) == 1 for _, ids in self.continuations)


@dataclass(frozen=True)
class _Family:
    """Contexts with their first num_shared tokens in common."""

    num_shared: int
    contexts: list[_Context]


def _families(contexts: list[_Context]) -> list[_Family]:
    """Sort contexts into those that begin alike, and all others. Sorted by ids, the former are neighbours."""
    families, others = [], _Family(0, [])
    group: list[_Context] = []
    shared = 0

    def close() -> None:
        if (len(group) - 1) * shared >= _MIN_SAVED:
            families.append(_Family(shared, group))
        else:
            others.contexts.extend(group)

    for context in sorted(contexts, key=lambda one: one.ids):
        # The last token is never shared: the pass over it gives the first token of the continuations.
        common = min(shared, _num_common(group[0].ids, context.ids), len(context.ids) - 1) if group else 0
        if common >= _MIN_SHARED:
            group.append(context)
            shared = common
        else:
            close()
            group, shared = [context], len(context.ids) - 1
    close()
    return [*families, others] if others.contexts else families


def _num_common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def shared_prefix(prompts: Sequence[list[int]]) -> list[int]:
    """Return what all prompts begin with, less than the whole of any; nothing where a pass of its own saves too
    little."""
    if not prompts:
        return []
    # What the first and the last in order have in common, all have.
    first, last = min(prompts), max(prompts)
    shared = min(_num_common(first, last), min(map(len, prompts)) - 1)
    return first[:shared] if shared >= _MIN_SHARED and (len(prompts) - 1) * shared >= _MIN_SAVED else []


class _Pass:
    """Scores one family."""

    def __init__(self, model: Transformer, family: _Family, max_tokens: int) -> None:
        self._model, self._family, self._max_tokens = model, family, max_tokens
        self._device = next(model.parameters()).device

    def run(self) -> Iterator[tuple[int, Likelihood]]:
        shared = self._family.num_shared
        prefix = PrefixCache()
        if shared:
            self._read(prefix, [self._family.contexts[0].ids[:shared]])
        for batch in self._batches():
            cache = prefix.fork(torch.zeros(len(batch), dtype=torch.int64, device=self._device))
            hidden, lengths = self._read(cache, [context.ids[shared:] for context in batch])
            last = hidden[torch.arange(len(batch), device=self._device), lengths - 1]  # (B, C)
            yield from self._score(batch, cache, last)

    def _batches(self) -> Iterator[list[_Context]]:
        """Contexts of one length, since what follows them is read at one place of the cache; those that nothing
        follows may differ."""
        batch: list[_Context] = []
        for context in sorted(self._family.contexts, key=lambda one: (one.is_read_once, len(one.ids))):
            fits = (len(batch) + 1) * len(context.ids) <= self._max_tokens
            alike = not batch or batch[-1].is_read_once == context.is_read_once
            if batch and not (fits and alike and (context.is_read_once or len(context.ids) == len(batch[-1].ids))):
                yield batch
                batch = []
            batch.append(context)
        if batch:
            yield batch

    def _read(self, cache: PrefixCache, rows: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """Let the model read rows after what the cache holds; return hidden states (B, T, C) and lengths (B,)."""
        tokens, lengths = pad_right(rows, self._device)
        T = tokens.shape[1]
        positions = torch.arange(cache.length, cache.length + T, device=self._device)
        hidden = self._model(tokens, positions=positions, cache=cache)
        cache.advance(T)
        return hidden, lengths

    def _score(self, batch: list[_Context], cache: PrefixCache, last: Tensor) -> Iterator[tuple[int, Likelihood]]:
        rows = [(b, index, ids) for b, context in enumerate(batch) for index, ids in context.continuations]
        first, first_greedy = self._token_scores(
            last[[b for b, _, _ in rows]], torch.tensor([ids[0] for _, _, ids in rows], device=self._device)
        )
        totals, greedy = first.tolist(), first_greedy.tolist()
        for block in self._blocks(rows, cache.length):
            hidden, lengths = self._read(
                cache.fork(torch.tensor([rows[n][0] for n in block], device=self._device)),
                [rows[n][2][:-1] for n in block],
            )
            real = torch.arange(hidden.shape[1], device=self._device) < lengths[:, None]  # (B, T)
            targets = torch.tensor([token for n in block for token in rows[n][2][1:]], device=self._device)
            scores, best = self._token_scores(hidden[real], targets)
            start = 0
            for n, length in zip(block, lengths.tolist(), strict=True):
                totals[n] += float(scores[start : start + length].sum())
                greedy[n] = greedy[n] and bool(best[start : start + length].all())
                start += length
        for (_, index, _), total, is_greedy in zip(rows, totals, greedy, strict=True):
            yield index, Likelihood(total, is_greedy)

    def _blocks(self, rows: list[tuple[int, int, tuple[int, ...]]], num_before: int) -> Iterator[list[int]]:
        """Places in rows of the continuations of more than one token, those of like length together."""
        block: list[int] = []
        for n in sorted((n for n in range(len(rows)) if len(rows[n][2]) > 1), key=lambda n: len(rows[n][2])):
            if block and (len(block) + 1) * (num_before + len(rows[n][2]) - 1) > self._max_tokens:
                yield block
                block = []
            block.append(n)
        if block:
            yield block

    def _token_scores(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """hidden: (N, C), targets: (N,) int64. Returns log-probabilities (N,) float64, and (N,) bool, whether a target
        is the likeliest token."""
        scores, best = [], []
        for h, t in zip(hidden.split(_LOGIT_ROWS), targets.split(_LOGIT_ROWS), strict=True):
            logits = self._model.logits(h.float())  # (N, V): rounded to 16 bits they would differ in the second digit
            picked = logits.gather(1, t[:, None])[:, 0]
            scores.append((picked - logits.logsumexp(-1)).double())
            best.append(logits.argmax(-1) == t)
        return torch.cat(scores), torch.cat(best)
