"""Steps on how words are written: contractions, British and American spelling, misspelling.

Candidates are found by one linear-time scan over the text; each keeps the case it was written in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

import numpy as np

from warploom.curate.document import Document, Step, at_most
from warploom.curate.optional import optional
from warploom.curate.spelling_table import gb_to_us, us_to_gb
from warploom.curate.words import Words, split_words
from warploom.errors import UserError

_CONTRACTIONS = {
    **{f"{verb}n't": f"{verb} not" for verb in (
        "are could did does do had has have is might must need should was were would").split()},
    "can't": "cannot", "won't": "will not", "shan't": "shall not", "mustn't": "must not", "let's": "let us",
    "i'm": "I am", "'tis": "it is", "'twas": "it was", "y'all": "you all", "ma'am": "madam",
    **{f"{who}'re": f"{who} are" for who in "you we they".split()},
    **{f"{who}'ve": f"{who} have" for who in "i you we they could should would might".split()},
    **{f"{who}'ll": f"{who} will" for who in "i you he she it we they that there".split()},
}  # fmt: skip


@dataclass(kw_only=True)
class Contractions(Step):
    """Write contractions out: don't, do not. 's and 'd stay, which may be is, has or a genitive, had or would."""

    NAME = "contractions"
    kind = "edit"

    def apply(self, document: Document) -> None:
        text = document.text
        if "'" in text or "\u2019" in text:
            text, count = replace_words(text, _contractions(), lambda word: _CONTRACTIONS[word.replace("\u2019", "'")])
            self.stats.counts["contractions"] += count
            self.change(document, text)


@dataclass(kw_only=True)
class Spelling(Step):
    """Write words in British or in American spelling throughout, by a table of the pairs."""

    NAME = "spelling"
    kind = "edit"

    to: Literal["us", "gb"] = "us"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.to not in ("us", "gb"):
            raise UserError(f"spelling.to must be us or gb, got {self.to!r}")

    def apply(self, document: Document) -> None:
        table = gb_to_us() if self.to == "us" else us_to_gb()
        text, count = replace_words(document.text, _spellings(self.to), table.__getitem__)
        self.stats.counts["words"] += count
        self.change(document, text)


@dataclass(kw_only=True)
class Misspelling(Step):
    """Measure the share of words that are in no English dictionary, and correct them if asked to.

    Counted are lower-case words of Latin letters: names, acronyms and code would be taken for mistakes.
    """

    NAME = "misspelling"
    kind = "edit"

    correct: bool = False
    """Replace an unknown word by the most frequent one at edit distance 1, if there is any."""
    min_letters: int = 4
    """Shorter words are not judged."""
    max_rate: float = at_most("rate", 0.2)

    def apply(self, document: Document) -> None:
        words = document.words
        judged, unknown = self._unknown(words)
        self.put(document, {"rate": len(unknown) / max(judged, 1)})
        self.stats.counts["unknown words"] += len(unknown)
        if self.correct and len(unknown):
            self._correct(document, words, unknown)

    def _unknown(self, words: Words) -> tuple[int, np.ndarray]:
        """(number of words judged, indices of those in no dictionary). A mark at a word's end is no part of it."""
        starts, ends = words.starts, words.ends.copy()
        for _ in range(2):
            last = words.codes[np.maximum(ends - 1, 0)]
            ends -= (ends > starts) & np.isin(last, _END_MARKS)
        is_lower = (words.codes >= ord("a")) & (words.codes <= ord("z"))
        before = np.concatenate([[0], np.cumsum(is_lower)])
        plain = (before[ends] - before[starts] == ends - starts) & (ends - starts >= self.min_letters)
        indices = np.flatnonzero(plain)
        hashes = Words(starts[indices], ends[indices], np.empty(0, np.uint64), words.codes).rehash()
        known = _dictionary_hashes()
        places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        return len(indices), indices[known[places] != hashes]

    def _correct(self, document: Document, words: Words, unknown: np.ndarray) -> None:
        library, checker = optional("symspellpy"), _checker()
        text = document.text
        parts, done = [], 0
        for start, end in zip(words.starts[unknown].tolist(), words.ends[unknown].tolist(), strict=True):
            word = text[start:end].rstrip(".,;:!?\"')")
            found = checker.lookup(word, library.Verbosity.TOP, max_edit_distance=1)
            if found and found[0].distance == 1:
                parts += [text[done:start], found[0].term]
                done = start + len(word)
                self.stats.counts["corrected"] += 1
        self.change(document, "".join([*parts, text[done:]]))


_END_MARKS = np.frombuffer(b".,;:!?\"')", np.uint8)


def replace_words(text: str, scanner: Any, replacement: Callable[[str], str]) -> tuple[str, int]:
    """Replace the words that a scanner finds by what replacement gives for them in lower case. Returns the text and
    the number of replacements."""
    data = text.encode("utf-8")
    parts: list[bytes] = []
    done = 0
    for match in scanner.finditer(data):
        word = match[0].decode("utf-8")
        new = replacement(word.lower())
        if word.isupper() and len(word) > 2:
            new = new.upper()
        elif word[0].isupper():
            new = new[0].upper() + new[1:]
        parts += [data[done : match.start()], new.encode("utf-8")]
        done = match.end()
    return (b"".join([*parts, data[done:]]).decode("utf-8"), len(parts) // 2) if parts else (text, 0)


@functools.cache
def _contractions() -> Any:
    words = [word.replace("'", "(?:'|\u2019)") for word in sorted(_CONTRACTIONS)]
    return word_scanner(words, escape=False)


@functools.cache
def _spellings(to: str) -> Any:
    return word_scanner(gb_to_us() if to == "us" else us_to_gb())


def word_scanner(words: Any, escape: bool = True) -> Any:
    """A linear-time scanner for any of the words, whole and in any case, over UTF-8 bytes."""
    re2 = optional("re2")
    options = re2.Options()
    options.max_mem = 256 << 20
    options.case_sensitive = False
    options.encoding = re2.Options.Encoding.LATIN1
    # Leftmost-longest: "don't" must not be found in "don'ts", nor "man" in "manage".
    options.longest_match = True
    alternatives = "|".join(re2.escape(word) if escape else word for word in sorted(words))
    return re2.compile(rf"\b(?:{alternatives})\b".encode(), options)


@functools.cache
def _dictionary() -> Mapping[str, int]:
    """Word -> frequency: the dictionary of 82,765 English words inside symspellpy, and British forms of its words."""
    package = optional("symspellpy").__name__
    text = files(package).joinpath("frequency_dictionary_en_82_765.txt").read_text(encoding="utf-8-sig")
    counts = {word: int(count) for word, count in (line.split() for line in text.splitlines() if line.strip())}
    for british, american in gb_to_us().items():
        if american in counts:
            counts.setdefault(british, counts[american])
    return counts


@functools.cache
def _dictionary_hashes() -> np.ndarray:
    """Sorted hashes of the dictionary's words."""
    return np.unique(split_words(" ".join(_dictionary()), "space").hashes)


@functools.cache
def _checker() -> Any:
    checker = optional("symspellpy").SymSpell(max_dictionary_edit_distance=1, prefix_length=7)
    for word, count in _dictionary().items():
        checker.create_dictionary_entry(word, count)
    return checker
