"""Rules on lines and words that Gopher, C4, FineWeb and RefinedWeb cut web text by, every constant a field.

Words are what stands between white space; a tokenizer that splits off punctuation counts more of them and cuts
elsewhere at the same numbers, so the splitter is part of the rule.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from warploom.curate.document import Document, Step, at_least, at_most
from warploom.curate.words import count_words, is_alphabetic, lookup, split_words

_BULLETS = (
    "\u2022",
    "\u2023",
    "\u25b6",
    "\u25c0",
    "\u25e6",
    "\u25a0",
    "\u25a1",
    "\u25aa",
    "\u25ab",
    "\u2013",
    "-",
    "*",
)
_STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_SENTENCE = re.compile(r"[.!?][\"')\]\u201d\u2019]*(?:\s|$)")
_TERMINAL = (".", "!", "?", '"', "'", "\u201d", "\u2019", "\u2026", "\u3002", "\uff01", "\uff1f")


@dataclass(kw_only=True)
class GopherQuality(Step):
    """Gopher's quality rules (Rae et al., 2021, A.1.1)."""

    NAME = "gopher_quality"

    min_words: float = at_least("words", 50)
    max_words: float = at_most("words", 100_000)
    min_word_length: float = at_least("word_length", 3)
    max_word_length: float = at_most("word_length", 10)
    max_hashes: float = at_most("hashes", 0.1)
    """Number signs per word."""
    max_ellipses: float = at_most("ellipses", 0.1)
    """Ellipses per word."""
    max_bullet_lines: float = at_most("bullet_lines", 0.9)
    max_ellipsis_lines: float = at_most("ellipsis_lines", 0.3)
    min_alphabetic: float = at_least("alphabetic", 0.8)
    """Share of words with a letter."""
    min_stop_words: float = at_least("stop_words", 2)
    """Different ones among the, be, to, of, and, that, have, with."""

    def apply(self, document: Document) -> None:
        text = document.text
        words = document.words
        count = max(len(words), 1)
        lines = [line for line in map(str.strip, text.split("\n")) if line]
        letters = lookup(words.codes, is_alphabetic)
        # A running count of letters tells of each word whether it has one.
        before = np.concatenate([[0], np.cumsum(letters)])
        self.put(
            document,
            {
                "words": len(words),
                "word_length": words.lengths.sum() / count,
                "hashes": text.count("#") / count,
                "ellipses": (text.count("...") + text.count("\u2026")) / count,
                "bullet_lines": sum(line.startswith(_BULLETS) for line in lines) / max(len(lines), 1),
                "ellipsis_lines": sum(line.endswith(("...", "\u2026")) for line in lines) / max(len(lines), 1),
                "alphabetic": np.count_nonzero(before[words.ends] > before[words.starts]) / count,
                "stop_words": _count_stop_words(words.hashes),
            },
        )


@functools.cache
def _stop_word_hashes() -> tuple[np.ndarray, np.ndarray]:
    """Sorted hashes of the stop words, in lower case, with a capital and in capitals; and the number of each's word."""
    forms = [form for word in _STOP_WORDS for form in (word, word.capitalize(), word.upper())]
    hashes = split_words(" ".join(forms), "space").hashes
    order = np.argsort(hashes)
    return hashes[order], order // 3


def _count_stop_words(hashes: np.ndarray) -> int:
    """How many different stop words are among the words."""
    known, numbers = _stop_word_hashes()
    places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    return int(np.count_nonzero(np.bincount(numbers[places[known[places] == hashes]], minlength=1)))


@dataclass(kw_only=True)
class C4Lines(Step):
    """C4's rules (Raffel et al., 2020, 2.2): lines that are no sentences go, then pages with too little left.

    The number of words a line needs and of sentences a page needs stand in the paper's versions both ways round (5 and
    3, 3 and 5); these are the reference code's.
    """

    NAME = "c4"
    kind = "edit"

    terminal_punctuation: bool = True
    """Remove lines that do not end in . ! ? or a quotation mark; FineWeb leaves this one out."""
    min_line_words: int = 5
    """Remove lines of fewer words."""
    max_word_chars: int = 1000
    """Remove lines with a longer word."""
    line_phrases: tuple[str, ...] = (
        "javascript",
        "terms of use",
        "privacy policy",
        "cookie policy",
        "uses cookies",
        "use of cookies",
        "use cookies",
    )
    """Remove lines that hold one of these, in lower case."""
    page_phrases: tuple[str, ...] = ("lorem ipsum", "{")
    """A page with one of these counts as boilerplate or code."""
    min_sentences: float = at_least("sentences", 3)
    max_page_phrases: float = at_most("page_phrases", 0)

    def apply(self, document: Document) -> None:
        lowered = document.text.lower()
        phrases = sum(phrase in lowered for phrase in self.page_phrases)
        line_phrases = [phrase for phrase in self.line_phrases if phrase in lowered]  # mostly none: lines are spared
        kept = []
        counts: Counter[str] = Counter()
        for line in document.text.split("\n"):
            reason = self._reason(line.strip(), line_phrases)
            if reason:
                counts[reason] += 1
            else:
                kept.append(line)
        self.stats.counts.update(counts)
        text = "\n".join(kept).strip("\n")
        self.change(document, text)
        self.put(
            document,
            {
                "sentences": len(_SENTENCE.findall(text)),
                "page_phrases": phrases,
                "lines_removed": sum(counts.values()),
            },
        )

    def _reason(self, line: str, phrases: list[str]) -> str | None:
        """Why the line goes; phrases: those of line_phrases that the page has."""
        if not line:
            return None
        if self.terminal_punctuation and not line.endswith((".", "!", "?", '"', "\u201d")) or line.endswith("..."):
            return "line without end mark"
        if self.min_line_words > 0 and len(line.split(None, self.min_line_words - 1)) < self.min_line_words:
            return "line too short"
        if len(line) > self.max_word_chars and max(map(len, line.split())) > self.max_word_chars:
            return "line with endless word"
        if phrases:
            lowered = line.lower()
            if any(phrase in lowered for phrase in phrases):
                return "line of policy or script"
        return None


@dataclass(kw_only=True)
class FineWeb(Step):
    """FineWeb's own rules (Penedo et al., 2024, 3.6)."""

    NAME = "fineweb"

    min_punctuated_lines: float = at_least("punctuated_lines", 0.12)
    max_short_lines: float = at_most("short_lines", 0.67)
    short_line_chars: int = 30
    max_duplicate_line_chars: float = at_most("duplicate_line_chars", 0.01)
    max_newlines_per_word: float = at_most("newlines_per_word", 0.3)

    def apply(self, document: Document) -> None:
        lines = [line for line in document.text.split("\n") if line.strip()]
        count = max(len(lines), 1)
        seen: set[str] = set()
        duplicate_chars = 0
        for line in lines:
            if line in seen:
                duplicate_chars += len(line)
            seen.add(line)
        chars = len(document.text) - document.text.count("\n")
        self.put(
            document,
            {
                "punctuated_lines": sum(line.rstrip().endswith(_TERMINAL) for line in lines) / count,
                "short_lines": sum(len(line) <= self.short_line_chars for line in lines) / count,
                "duplicate_line_chars": duplicate_chars / max(chars, 1),
                "newlines_per_word": document.text.count("\n") / max(count_words(document.text), 1),
            },
        )


@dataclass(kw_only=True)
class RefinedWebLines(Step):
    """RefinedWeb's line-wise corrections (Penedo et al., 2023, table 2): buttons, counters and navigation go."""

    NAME = "refinedweb_lines"
    kind = "edit"

    max_uppercase: float = 0.6
    """Remove lines with a larger share of capital letters."""
    max_digits: float = 0.9
    """Remove lines with a larger share of digits."""
    counter_words: tuple[str, ...] = ("likes", "shares", "comments", "retweets", "reposts", "views", "reply", "replies")
    """Remove a line of at most two words that ends in one of these."""
    short_line_words: int = 10
    short_line_phrases: tuple[str, ...] = ("sign-in", "sign in", "log in", "read more...", "items in cart")
    """Remove a line of at most short_line_words that begins or ends with one of these."""
    max_removed: float = at_most("removed_words", 0.05)
    """Share of a page's words in removed lines."""

    def apply(self, document: Document) -> None:
        kept = []
        removed = total = 0
        for line in document.text.split("\n"):
            words = line.split()
            total += len(words)
            if words and self._is_noise(line.strip(), words):
                removed += len(words)
            else:
                kept.append(line)
        self.change(document, "\n".join(kept))
        self.put(document, {"removed_words": removed / max(total, 1)})

    def _is_noise(self, line: str, words: list[str]) -> bool:
        letters = sum(map(str.isalpha, line))
        if letters and sum(map(str.isupper, line)) > self.max_uppercase * letters and len(words) > 1:
            return True
        if sum(map(str.isdigit, line)) > self.max_digits * len(line.replace(" ", "")):
            return True
        lowered = line.lower()
        if len(words) <= 2 and lowered.split()[-1] in self.counter_words:
            return True
        return len(words) <= self.short_line_words and (
            lowered.startswith(self.short_line_phrases) or lowered.endswith(self.short_line_phrases)
        )
