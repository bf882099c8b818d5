"""Words that sources use differently: "python" among programmers and among zoologists, "bank" by a river and in a city.

For each word, each source gets the distribution of the words that stand near it, hashed into a few hundred columns. Two
sources agree on a word as far as their distributions overlap, beside how far the two halves of each source overlap, so
that rare words do not look different by chance. The words with the least agreement are listed, with their occurrences
in each source, for a person to balance or to tag; nothing is deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from warploom.curate.words import mix, split_words
from warploom.errors import UserError

_COLUMNS = 512
_WINDOW = 4  # words to each side
_COMMON = 50  # the most frequent words are grammar: they say nothing of a neighbour, and are not judged


@dataclass(frozen=True)
class Homograph:
    """A word with its least agreement between two sources (0 to 1), which they are, its occurrences."""

    word: str
    agreement: float
    sources: tuple[str, str]
    counts: dict[str, int]


def homographs(
    documents: Callable[[], Iterator[tuple[str, str]]], min_count: int = 50, num_words: int = 5000
) -> list[Homograph]:
    """The words that two sources use most differently, the most different first.

    documents: begins a pass over (source, text). min_count: occurrences in each of the two sources. num_words: the
    most frequent words are looked at. Raises UserError if there are not two sources.
    """
    counts, spelled = _count_words(documents)
    sources = sorted(counts)
    if len(sources) < 2:
        raise UserError(f"an audit compares the words of sources, and there is but {', '.join(sources) or 'none'}")
    total: dict[int, int] = {}
    for by_word in counts.values():
        for word, count in by_word.items():
            total[word] = total.get(word, 0) + count
    ranked = sorted(total, key=lambda word: (-total[word], word))
    judged = [
        word
        for word in ranked[_COMMON : _COMMON + num_words]
        if sum(counts[source].get(word, 0) >= min_count for source in sources) >= 2
    ]
    contexts = _contexts(documents, sources, judged, set(ranked[:_COMMON]))
    found = []
    for index, word in enumerate(judged):
        having = [s for s, source in enumerate(sources) if counts[source].get(word, 0) >= min_count]
        pairs = [(a, b) for position, a in enumerate(having) for b in having[position + 1 :]]
        agreement, a, b = min((_agreement(contexts[a, :, index], contexts[b, :, index]), a, b) for a, b in pairs)
        by_source = {source: counts[source].get(word, 0) for source in sources}
        found.append(Homograph(spelled[word], round(agreement, 4), (sources[a], sources[b]), by_source))
    return sorted(found, key=lambda item: (item.agreement, item.word))


def _count_words(
    documents: Callable[[], Iterator[tuple[str, str]]],
) -> tuple[dict[str, dict[int, int]], dict[int, str]]:
    """Occurrences of each word (by hash) in each source, and how words are written."""
    counts: dict[str, dict[int, int]] = {}
    spelled: dict[int, str] = {}
    for source, text in documents():
        words = split_words(text, "letters")
        hashes, first, occurrences = np.unique(words.hashes, return_index=True, return_counts=True)
        by_word = counts.setdefault(source, {})
        for word, place, count in zip(hashes.tolist(), first.tolist(), occurrences.tolist(), strict=True):
            by_word[word] = by_word.get(word, 0) + count
            if word not in spelled:
                codes = words.codes[words.starts[place] : words.ends[place]]
                spelled[word] = "".join(map(chr, codes.tolist()))
    return counts, spelled


def _contexts(
    documents: Callable[[], Iterator[tuple[str, str]]], sources: list[str], judged: list[int], common: set[int]
) -> np.ndarray:
    """(num_sources, 2, num_judged, _COLUMNS) square roots of the shares of each column among a word's neighbours, in
    the even and in the odd documents of a source."""
    known = np.sort(np.array(judged, np.uint64))
    place_of = np.searchsorted(known, np.array(judged, np.uint64))
    frequent = np.sort(np.array(list(common), np.uint64))
    near = np.zeros((len(sources), 2, len(judged), _COLUMNS), np.float32)
    for number, (source, text) in enumerate(documents()):
        hashes = split_words(text, "letters").hashes
        hashes = hashes[~np.isin(hashes, frequent)]
        if not len(hashes) or not len(known):
            continue
        columns = (mix(hashes) >> np.uint64(64 - _COLUMNS.bit_length() + 1)).astype(np.int64)
        places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        at = np.flatnonzero(known[places] == hashes)
        table = near[sources.index(source), number % 2]
        for offset in (*range(-_WINDOW, 0), *range(1, _WINDOW + 1)):
            inside = at[(at + offset >= 0) & (at + offset < len(hashes))]
            np.add.at(table, (places[inside], columns[inside + offset]), 1)
    near = near[:, :, place_of]
    return np.sqrt(near / np.maximum(near.sum(axis=3, keepdims=True), 1))


def _agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Overlap (Bhattacharyya coefficient) of two sources' distributions over that of each source's halves; a, b: (2,
    _COLUMNS)."""
    within = float(a[0] @ a[1]) * float(b[0] @ b[1])
    return min(1.0, float((a @ b.T).mean()) / max(within, 1e-6) ** 0.5)
