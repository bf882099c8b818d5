"""Duplicates: exact by document, exact by line, near by MinHash. The steps write hashes beside the documents; which
copy stays is decided afterwards, over the documents that the steps before have kept.

Memory is bounded: keys lie on disk, and groups of equal keys are found in as many passes over them as it takes to
sort no more than a fixed number at once. The result depends on the corpus alone: of each group the longest document
stays, of equal ones the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from warploom.curate.document import Document, Step
from warploom.curate.minhash import shingles, signature
from warploom.errors import UserError

SORTED_AT_ONCE = 1 << 22  # keys: 64 MB with their documents
# In a group of equal bands, all pairs are looked at up to this size; beyond, each with its neighbour and the first.
_ALL_PAIRS = 32


@dataclass(kw_only=True)
class ExactDedup(Step):
    """Of documents with the same text, white space apart, keep the first."""

    NAME = "exact_dedup"
    kind = "dedup"

    def apply(self, document: Document) -> None:
        normal = " ".join(document.text.split())
        document.arrays["exact"] = np.array([xxhash.xxh3_64_intdigest(normal.encode("utf-8", "replace"))], np.uint64)


@dataclass(kw_only=True)
class NearDedup(Step):
    """Of documents that share most of their word n-grams, keep the longest."""

    NAME = "near_dedup"
    kind = "dedup"

    jaccard: float = 0.8
    """Documents are linked if their sets of n-grams overlap at least so much; a cluster is what links connect."""
    num_bands: int = 14
    band_hashes: int = 8
    """A pair of Jaccard similarity s is looked at with probability 1 - (1 - s**band_hashes)**num_bands."""
    ngram: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.jaccard <= 1:
            raise UserError(f"near_dedup.jaccard must be above 0 and at most 1, got {self.jaccard}; 0.8 is usual")

    def apply(self, document: Document) -> None:
        hashes = shingles(document.text, self.ngram)
        if len(hashes):
            document.arrays["shingles"] = hashes
            document.arrays["minhash"] = signature(hashes, self.num_bands * self.band_hashes)

    def tag_settings(self) -> dict[str, object]:
        return {name: value for name, value in super().tag_settings().items() if name != "jaccard"}


@dataclass(kw_only=True)
class LineDedup(Step):
    """Remove lines that stand in several documents, but for their first occurrence. It acts when the text is written,
    on the lines as the last step has left them."""

    NAME = "line_dedup"
    kind = "dedup"

    min_chars: int = 30
    """Shorter lines are left alone."""
    keep_occurrences: int = 1
    """So many occurrences of a line stay."""

    def apply(self, document: Document) -> None:
        lines = document.text.split("\n")
        document.arrays["lines"] = np.array(
            [
                xxhash.xxh3_64_intdigest(line.encode("utf-8", "replace")) if len(line) >= self.min_chars else 0
                for line in map(str.strip, lines)
            ],
            np.uint64,
        )


def equal_groups(columns: list[np.ndarray], alive: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the rows of each group of at least two equal keys, ascending. columns: uint64 keys, end to end the rows;
    alive: (num_rows,) bool, which rows count. Key 0 is none."""
    total = sum(map(len, columns))
    parts = max(1, -(-total // SORTED_AT_ONCE))
    width = -(-(1 << 64) // parts)
    for part in range(parts):
        keys_of_part, rows_of_part = [], []
        first = 0
        for column in columns:
            keys = np.asarray(column)
            wanted = alive[first : first + len(keys)] & (keys != 0)
            if parts > 1:
                wanted &= (keys >= np.uint64(part * width)) & (
                    keys <= np.uint64(min((part + 1) * width - 1, 2**64 - 1))
                )
            rows = np.flatnonzero(wanted)
            keys_of_part.append(keys[rows])
            rows_of_part.append(rows + first)
            first += len(keys)
        keys, rows = np.concatenate(keys_of_part), np.concatenate(rows_of_part)
        order = np.lexsort((rows, keys))
        keys, rows = keys[order], rows[order]
        if not len(keys):
            continue
        borders = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1], [True]]))
        for low, high in zip(borders[:-1], borders[1:], strict=True):
            if high - low > 1:
                yield rows[low:high]


def candidate_pairs(group: np.ndarray) -> Iterator[tuple[int, int]]:
    """The pairs of a group of rows that are looked at."""
    rows = group.tolist()
    if len(rows) <= _ALL_PAIRS:
        for index, a in enumerate(rows):
            for b in rows[index + 1 :]:
                yield a, b
    else:
        for previous, row in zip(rows, rows[1:], strict=False):
            yield previous, row
            if previous != rows[0]:
                yield rows[0], row


class UnionFind:
    """Disjoint sets of 0 .. size - 1 in a file; the smallest member of a set is its root."""

    def __init__(self, path: Path, size: int):
        self._parent = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint32, shape=(size,))
        self._parent[:] = np.arange(size, dtype=np.uint32)

    def find(self, member: int) -> int:
        parent = self._parent
        root = int(parent[member])
        while root != (above := int(parent[root])):
            parent[member] = above
            member, root = root, above
        return root

    def union(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        if a != b:
            self._parent[max(a, b)] = min(a, b)

    def roots(self) -> np.ndarray:
        """(size,) uint32: the root of each, with every path made short."""
        for member in np.flatnonzero(self._parent != np.arange(len(self._parent))).tolist():
            self._parent[member] = self.find(member)
        return self._parent
