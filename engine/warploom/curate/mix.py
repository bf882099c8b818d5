"""The mix: how often each source is seen, and the order of its documents in the stream a model is trained on.

Shares come from weights, or from tokens, softened by a temperature; no document is seen in more epochs than its source
allows, and what a capped source leaves goes to the others. Each epoch of a source is a permutation by a seeded hash,
and sources are interleaved evenly: at any point of the stream each has given its share. All of it is a function of the
documents' lengths and the seed, so any place in the stream can be found again, to the token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from warploom.curate.pipeline import Mix, Source
from warploom.curate.words import mix as mix_bits
from warploom.errors import UserError

# FineWeb-2: a document of a cluster of this size or more is seen so many times (Penedo et al., 2025, 5.3).
CLUSTER_REPEATS = ((1, 1), (2, 2), (3, 3), (5, 5), (100, 8), (1000, 1))


@dataclass(frozen=True)
class MixOrder:
    """documents: (num_slots,) index of the document in each slot of the stream; starts: (num_slots + 1,) token where
    each begins; epochs: (num_slots,) how often it was seen before. shares: by source, of the stream's tokens."""

    documents: np.ndarray
    starts: np.ndarray
    epochs: np.ndarray
    source_of: np.ndarray

    def locate(self, token: int) -> tuple[int, int]:
        """(slot, offset in its document) of a token of the stream, which is read as a ring."""
        token %= int(self.starts[-1])
        slot = int(np.searchsorted(self.starts, token, side="right")) - 1
        return slot, token - int(self.starts[slot])

    def seen(self, num_tokens: int, num_sources: int) -> list[int]:
        """Tokens of each source among the first num_tokens of the stream."""
        lengths = np.diff(self.starts)
        seen = np.clip(num_tokens - self.starts[:-1], 0, lengths)
        sources = self.source_of[self.documents]
        return np.bincount(sources, weights=seen, minlength=num_sources).astype(np.int64).tolist()


def budgets(sources: list[Source], tokens: np.ndarray, config: Mix) -> np.ndarray:
    """(num_sources,) int64 tokens that each source gives. tokens: what each has."""
    shares = np.array(
        [
            float(count) if source.weight is None else source.weight
            for source, count in zip(sources, tokens, strict=True)
        ]
    )
    if (shares < 0).any() or not (shares[tokens > 0] > 0).any():
        raise UserError(f"the weights of the sources must not be negative, and one be above 0, got {shares.tolist()}")
    shares = np.where(tokens > 0, shares, 0.0)
    shares = np.where(shares > 0, shares ** (1 / config.temperature), 0.0)
    caps = np.array([source.max_epochs for source in sources]) * tokens
    caps[shares == 0] = 0
    total = float(tokens.sum()) if config.tokens is None else float(config.tokens)
    given = np.zeros(len(sources))
    open_ = shares > 0
    while open_.any() and total - given.sum() > 0.5:
        wanted = given + np.where(open_, shares, 0) / shares[open_].sum() * (total - given.sum())
        given = np.minimum(wanted, caps)
        open_ &= given < caps
    if config.tokens is not None and given.sum() < 0.99 * total:
        raise UserError(
            f"mix.tokens asks for {config.tokens:,} tokens, sources and max_epochs allow {int(given.sum()):,}; "
            "ask for fewer, raise max_epochs, or give more text"
        )
    return given.astype(np.int64)


def cluster_repeats(sizes: np.ndarray) -> np.ndarray:
    """How often to see a document whose cluster of near-duplicates has this size."""
    bounds, repeats = np.array(CLUSTER_REPEATS).T
    return repeats[np.searchsorted(bounds, np.maximum(sizes, 1), side="right") - 1]


def order(lengths: np.ndarray, source_of: np.ndarray, repeats: np.ndarray, given: np.ndarray, seed: int) -> MixOrder:
    """The stream. lengths, source_of, repeats: (num_documents,), tokens, source, and occurrences in one epoch; given:
    (num_sources,) tokens to take of each."""
    slots, epochs, places = [], [], []
    for source, target in enumerate(given.tolist()):
        members = np.repeat(np.flatnonzero(source_of == source), repeats[source_of == source])
        taken = epoch = 0
        while taken < target and len(members):
            key = np.uint64((seed * 1_000_003 + source * 10_007 + epoch) % (1 << 64))
            keys = mix_bits(mix_bits(members.astype(np.uint64) + np.uint64(1)) + mix_bits(np.array([key]))[0])
            keys += np.arange(len(members), dtype=np.uint64)  # copies of one document lie apart
            shuffled = members[np.argsort(mix_bits(keys), kind="stable")]
            ends = np.cumsum(lengths[shuffled]) + taken
            count = int(np.searchsorted(ends, target, side="left")) + 1
            shuffled, ends = shuffled[:count], ends[:count]
            slots.append(shuffled)
            epochs.append(np.full(len(shuffled), epoch))
            places.append((ends - lengths[shuffled] / 2) / target)
            taken, epoch = int(ends[-1]), epoch + 1
    documents = np.concatenate([np.empty(0, np.int64), *slots])
    by_place = np.argsort(np.concatenate([np.empty(0), *places]), kind="stable")
    documents = documents[by_place]
    starts = np.concatenate([[0], np.cumsum(lengths[documents])])
    return MixOrder(documents, starts, np.concatenate([np.empty(0, np.int64), *epochs])[by_place], source_of)
