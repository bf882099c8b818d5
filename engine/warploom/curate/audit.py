"""Words that sources use differently: "python" among programmers and among zoologists, "bank" by a river and in a city.

For each word, each source gets a vector of the words that stand near it, as counts hashed into a few hundred columns
and weighted by how much more often than by chance they occur. The words whose vectors agree least are listed, with
the share of each source, for a person to balance or to tag; nothing is deleted.
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
    """A word with its least agreement (cosine of two sources' vectors), between which sources, and occurrences."""

    word: str
    similarity: float
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
    vectors = _contexts(documents, sources, judged, set(ranked[:_COMMON]))
    found = []
    for index, word in enumerate(judged):
        having = [s for s, source in enumerate(sources) if counts[source].get(word, 0) >= min_count]
        pairs = [(a, b) for position, a in enumerate(having) for b in having[position + 1 :]]
        similarity, a, b = min((_cosine(vectors[a, index], vectors[b, index]), a, b) for a, b in pairs)
        by_source = {source: counts[source].get(word, 0) for source in sources}
        found.append(Homograph(spelled[word], round(similarity, 4), (sources[a], sources[b]), by_source))
    return sorted(found, key=lambda item: (item.similarity, item.word))


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
    """(num_sources, num_judged, _COLUMNS) positive pointwise mutual information of word and column."""
    known = np.sort(np.array(judged, np.uint64))
    place_of = np.argsort(np.argsort(np.array(judged, np.uint64)))
    frequent = np.sort(np.array(list(common), np.uint64))
    near = np.zeros((len(sources), len(judged), _COLUMNS))
    for source, text in documents():
        hashes = split_words(text, "letters").hashes
        hashes = hashes[~np.isin(hashes, frequent)]
        if not len(hashes):
            continue
        columns = (mix(hashes) >> np.uint64(55)).astype(np.int64)
        places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        at = np.flatnonzero(known[places] == hashes)
        table = near[sources.index(source)]
        for offset in (*range(-_WINDOW, 0), *range(1, _WINDOW + 1)):
            inside = at[(at + offset >= 0) & (at + offset < len(hashes))]
            np.add.at(table, (places[inside], columns[inside + offset]), 1)
    near = near[:, place_of]
    total = near.sum(axis=2, keepdims=True)
    by_chance = near.sum(axis=1, keepdims=True) / np.maximum(near.sum(axis=(1, 2), keepdims=True), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.log(near / (total * by_chance))
    return np.maximum(np.nan_to_num(information, nan=0.0, neginf=0.0, posinf=0.0), 0.0)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-12))
