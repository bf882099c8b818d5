"""Words and their n-grams as arrays: a text is split, hashed and counted in a few passes of numpy, not word by word.

A text becomes an array of code points; a table says which belong to words; a polynomial prefix sum gives the hash of
every word at once. Two splitters: `space` (what stands between white space, as Gopher's and C4's rules count) and
`letters` (runs of letters and digits in lower case, what duplicates and contamination are looked for in).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

Splitter = Literal["space", "letters"]

_BLOCK = 1 << 20  # characters hashed at once: the tables of powers have this length
_PRIME = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_TABLE = 0x20000  # code points above are letters: CJK extensions
# Scripts written without spaces: each character counts as a word.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


@dataclass(frozen=True)
class Words:
    """The words of a text. starts, ends: (num_words,) int64 positions; hashes: (num_words,) uint64."""

    starts: np.ndarray
    ends: np.ndarray
    hashes: np.ndarray
    codes: np.ndarray  # (num_chars,) the text's code points, uint8 if it is ASCII

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> np.ndarray:
        return self.ends - self.starts

    def rehash(self) -> np.ndarray:
        """Hashes of these words from their places in codes: for words whose ends were moved."""
        return _word_hashes(self.codes, self.starts, self.ends)


def code_points(text: str) -> np.ndarray:
    """(len(text),) uint8 for ASCII text, uint32 otherwise."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), dtype=np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def split_words(text: str, splitter: Splitter) -> Words:
    """Split and hash a text. Positions are those of text for `space`; for `letters`, those of its normal form."""
    if splitter == "letters":
        text = text.lower()
        if not text.isascii():
            text = _UNSPACED.sub(r" \g<0> ", text)
    codes = code_points(text)
    inside = lookup(codes, _is_space if splitter == "space" else _is_letter)
    if splitter == "space":
        inside = ~inside
    starts, ends = runs(inside)
    return Words(starts, ends, _word_hashes(codes, starts, ends), codes)


def runs(inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(starts, ends) of the runs of True in a (num_chars,) bool array, int64."""
    framed = np.zeros(len(inside) + 2, dtype=bool)
    framed[1:-1] = inside
    edges = np.flatnonzero(framed[1:] != framed[:-1])
    return edges[0::2], edges[1::2]


def count_words(text: str) -> int:
    """len(text.split()) without making the words."""
    space = lookup(code_points(text), _is_space)
    return int(np.count_nonzero(space[:-1] & ~space[1:])) + bool(len(space) and not space[0])


def lookup(codes: np.ndarray, table: Callable[[], np.ndarray]) -> np.ndarray:
    """(num_chars,) bool: a property of each code point, from one of this module's tables."""
    return table().take(codes, mode="clip")


@functools.cache
def _is_space() -> np.ndarray:
    return _table(str.isspace)


@functools.cache
def _is_letter() -> np.ndarray:
    return _table(lambda char: char.isalnum() or "\u0300" <= char <= "\u036f" or "\u0900" <= char <= "\u0dff")


@functools.cache
def is_alphabetic() -> np.ndarray:
    """Table of str.isalpha."""
    return _table(str.isalpha)


def _table(holds: Callable[[str], bool]) -> np.ndarray:
    return np.array([holds(chr(code)) for code in range(_TABLE)])


@functools.cache
def _powers() -> tuple[np.ndarray, np.ndarray]:
    """_PRIME**i and _PRIME**-i modulo 2**64, (_BLOCK + 1,) uint64 each."""
    inverse = pow(_PRIME, -1, 1 << 64)
    tables = []
    for base in (_PRIME, inverse):
        factors = np.full(_BLOCK + 1, base, dtype=np.uint64)
        factors[0] = 1
        tables.append(np.cumprod(factors))
    return tables[0], tables[1]


def _word_hashes(codes: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Sum of (code + 1) * _PRIME**i over the word, i from its start, then mixed; by differences of prefix sums."""
    hashes = np.empty(len(starts), dtype=np.uint64)
    first = 0
    while first < len(starts):
        base = starts[first]
        last = int(np.searchsorted(ends, base + _BLOCK, side="right"))
        last = max(last, first + 1)
        end = min(int(ends[last - 1]), int(base) + _BLOCK)  # a "word" longer than the block is hashed by its beginning
        powers, inverses = _powers()
        terms = codes[base:end].astype(np.uint64)
        terms += np.uint64(1)
        terms *= powers[: len(terms)]
        prefix = np.empty(len(terms) + 1, dtype=np.uint64)
        prefix[0] = 0
        np.cumsum(terms, out=prefix[1:])
        low = starts[first:last] - base
        high = np.minimum(ends[first:last] - base, _BLOCK)
        hashes[first:last] = (prefix[high] - prefix[low]) * inverses[low]
        first = last
    return mix(hashes)


def mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the input reaches every bit of the output."""
    values = values ^ (values >> np.uint64(30))
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def extend_grams(grams: np.ndarray, next_hashes: np.ndarray) -> np.ndarray:
    """Hashes of (n+1)-grams from those of the n-grams and of the word after each; uint64."""
    grams = grams * np.uint64(_PRIME)
    grams ^= grams >> np.uint64(29)
    grams += next_hashes
    return grams


def gram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """(num_words - n + 1,) uint64 hashes of the n-grams, empty if there are fewer words."""
    count = len(hashes) - n + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    grams = hashes[:count]
    for offset in range(1, n):
        grams = extend_grams(grams, hashes[offset : offset + count])
    return mix(grams) if n > 1 else grams
