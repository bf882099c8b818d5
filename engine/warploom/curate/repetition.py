"""Gopher's repetition rules (Rae et al., 2021, table A1): lines, paragraphs and n-grams that a text says again.

A text that repeats no bigram repeats no trigram, so each n looks only at the places where the n-gram before it was
repeated: one sort of all bigrams, and ever smaller ones after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from warploom.curate.document import Document, Step, at_most
from warploom.curate.words import Words, extend_grams


@dataclass(kw_only=True)
class GopherRepetition(Step):
    """Bounds on the share of a text that repeats itself. Words are what stands between white space."""

    NAME = "gopher_repetition"

    max_duplicate_lines: float = at_most("duplicate_lines", 0.30)
    max_duplicate_paragraphs: float = at_most("duplicate_paragraphs", 0.30)
    max_duplicate_line_chars: float = at_most("duplicate_line_chars", 0.20)
    max_duplicate_paragraph_chars: float = at_most("duplicate_paragraph_chars", 0.20)
    max_top_2gram: float = at_most("top_2gram", 0.20)
    max_top_3gram: float = at_most("top_3gram", 0.18)
    max_top_4gram: float = at_most("top_4gram", 0.16)
    max_duplicate_5gram: float = at_most("duplicate_5gram", 0.15)
    max_duplicate_6gram: float = at_most("duplicate_6gram", 0.14)
    max_duplicate_7gram: float = at_most("duplicate_7gram", 0.13)
    max_duplicate_8gram: float = at_most("duplicate_8gram", 0.12)
    max_duplicate_9gram: float = at_most("duplicate_9gram", 0.11)
    max_duplicate_10gram: float = at_most("duplicate_10gram", 0.10)

    def apply(self, document: Document) -> None:
        text = document.text
        num_chars = max(len(text), 1)
        scores = {}
        # Of more than two newlines the rest stays in front of the next paragraph.
        paragraphs = [part.lstrip("\n") for part in text.strip().split("\n\n")]
        for name, parts in (("line", text.split("\n")), ("paragraph", paragraphs)):
            parts = [part for part in parts if part]
            count, chars = _duplicates(parts)
            scores[f"duplicate_{name}s"] = count / max(len(parts), 1)
            scores[f"duplicate_{name}_chars"] = chars / num_chars
        for n, repeated in gram_repetition(document.words):
            scores[f"{'top' if n <= 4 else 'duplicate'}_{n}gram"] = repeated / num_chars
        self.put(document, scores)


def _duplicates(parts: list[str]) -> tuple[int, int]:
    """How many of the parts were there before, and their characters."""
    distinct = set(parts)
    count = len(parts) - len(distinct)
    return count, (sum(map(len, parts)) - sum(map(len, distinct)) if count else 0)


def gram_repetition(words: Words) -> Iterator[tuple[int, int]]:
    """For n = 2..4, (n, characters of the most frequent n-gram times its occurrences, 0 if it occurs once); for n =
    5..10, (n, characters in n-grams that occurred before), none counted twice."""
    ends = np.zeros(len(words) + 1, dtype=np.int64)  # characters of the words before each
    np.cumsum(words.lengths, out=ends[1:])
    places = np.arange(len(words))
    grams = words.hashes
    for n in range(2, 11):
        num_inside = int(np.searchsorted(places, len(words) - n, side="right"))  # places ascend
        places, grams = places[:num_inside], grams[:num_inside]
        grams = extend_grams(grams, words.hashes[places + n - 1])
        order = np.argsort(grams)
        ordered = grams[order]
        same = ordered[1:] == ordered[:-1]
        if not same.any():
            yield from ((longer, 0) for longer in range(n, 11))
            return
        repeated = np.zeros(len(ordered), dtype=bool)
        repeated[1:] = same
        if n <= 4:
            borders = np.flatnonzero(~repeated)
            counts = np.diff(borders, append=len(ordered))
            firsts = np.minimum.reduceat(places[order], borders)
            first = int(firsts[counts == counts.max()].min())
            yield n, int(ends[first + n] - ends[first] + n - 1) * int(counts.max())
        repeated[:-1] |= same
        kept = order[repeated]
        kept.sort()
        places, grams = places[kept], grams[kept]
        if n >= 5:
            yield n, _said_again(places, grams, ends, n)


def _said_again(places: np.ndarray, grams: np.ndarray, ends: np.ndarray, n: int) -> int:
    """Walk through the repeated n-grams in order; one that was met before counts, and the next begins behind it."""
    seen: set[int] = set()
    total = free = 0
    for place, gram in zip(places.tolist(), grams.tolist(), strict=True):
        if place < free:
            continue
        if gram in seen:
            total += int(ends[place + n] - ends[place])
            free = place + n
        else:
            seen.add(gram)
    return total
