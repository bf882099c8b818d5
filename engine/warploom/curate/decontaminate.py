"""Contamination: documents that hold the questions or answers a model will be scored on, found by word n-grams.

The index is built from the task files themselves, the ones `warploom eval` scores: every string in them, whatever the
format. An item shorter than an n-gram is looked for as a whole.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from warploom.curate.document import Document, Step, at_most
from warploom.curate.words import gram_hashes, split_words
from warploom.data.documents import list_files
from warploom.data.task_files import TASK_ENDINGS, read_rows
from warploom.errors import UserError

_BLOCK_CHARS = 1 << 18
_FILTER_BITS = 26  # one look into 8 MB says no for most n-grams, before the search in the index


@dataclass(frozen=True)
class TaskIndex:
    """hashes: sorted distinct n-gram hashes, uint64; benchmarks: (num_hashes,) index into names of the first benchmark
    with each; filter: (2**26,) bool, by the upper bits of a hash, False where no hash is."""

    names: tuple[str, ...]
    hashes: np.ndarray
    benchmarks: np.ndarray
    filter: np.ndarray
    lengths: tuple[int, ...]  # of n-grams that are in the index
    num_items: tuple[int, ...]  # strings indexed, by benchmark


@dataclass(kw_only=True)
class Decontaminate(Step):
    """Drop documents that share word n-grams with task files."""

    NAME = "decontaminate"

    tasks: str = ""
    """A folder with a folder or file per benchmark: .jsonl .json .csv .tar, also compressed, .parquet, or
    what `datasets` saved."""
    ngram: int = 13
    """Words in a row that must agree."""
    min_item_words: int = 8
    """A shorter string of a task (an answer, a name) proves nothing and is left out."""
    max_hits: float = at_most("hits", 0)
    """N-grams in common that are forgiven."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks:
            raise UserError("the step decontaminate needs tasks = the folder of the task files")
        self._index = _index(self.tasks, self.ngram, self.min_item_words)

    def files(self) -> list[Path]:
        return list_files(self.tasks, TASK_ENDINGS)

    def benchmarks(self) -> dict[str, int]:
        """Number of strings in the index, by benchmark."""
        return dict(zip(self._index.names, self._index.num_items, strict=True))

    def apply(self, document: Document) -> None:
        index = self._index
        words = split_words(document.text, "letters").hashes
        found: list[np.ndarray] = []
        for length in index.lengths:
            grams = gram_hashes(words, length)
            grams = grams[index.filter[(grams >> np.uint64(64 - _FILTER_BITS)).astype(np.int64)]]
            if len(grams):
                places = np.minimum(np.searchsorted(index.hashes, grams), len(index.hashes) - 1)
                found.append(places[index.hashes[places] == grams])
        hits = np.concatenate(found) if found else np.empty(0, np.int64)
        scores: dict[str, float] = {"hits": len(hits)}
        if len(hits):
            for benchmark, count in enumerate(np.bincount(index.benchmarks[hits], minlength=len(index.names)).tolist()):
                if count:
                    scores[f"hits.{index.names[benchmark]}"] = count
                    self.stats.counts[f"documents with {index.names[benchmark]}"] += 1
        self.put(document, scores)


@functools.lru_cache(maxsize=2)
def _index(folder: str, ngram: int, min_words: int) -> TaskIndex:
    root = Path(folder)
    by_benchmark: dict[str, list[Path]] = {}
    for file in list_files(folder, TASK_ENDINGS):
        inside = file.relative_to(root) if root.is_dir() else Path(file.name)
        name = inside.parts[0] if len(inside.parts) > 1 else inside.name.split(".")[0]
        by_benchmark.setdefault(name, []).append(file)
    names = tuple(sorted(by_benchmark))
    parts, owners, num_items, lengths = [], [], [], {ngram}
    for number, name in enumerate(names):
        items = 0
        for block in _blocks(text for file in by_benchmark[name] for text in strings(file)):
            for length, count, grams in _grams(block, ngram, min_words):
                items += count
                lengths.add(length)
                parts.append(grams)
                owners.append(np.full(len(grams), number, np.int16))
        num_items.append(items)
    if not parts:
        raise UserError(
            f"the task files in {folder} have no string of {min_words} words or more; nothing to compare with"
        )
    hashes, first = np.unique(np.concatenate(parts), return_index=True)
    bloom = np.zeros(1 << _FILTER_BITS, np.bool_)
    bloom[(hashes >> np.uint64(64 - _FILTER_BITS)).astype(np.int64)] = True
    return TaskIndex(names, hashes, np.concatenate(owners)[first], bloom, tuple(sorted(lengths)), tuple(num_items))


def _blocks(texts: Iterable[str]) -> Iterator[str]:
    """Join strings, a line each, to blocks worth a pass of numpy."""
    lines: list[str] = []
    size = 0
    for text in texts:
        lines.append(text.replace("\n", " "))
        size += len(text)
        if size >= _BLOCK_CHARS:
            yield "\n".join(lines)
            lines, size = [], 0
    yield "\n".join(lines)


def _grams(block: str, ngram: int, min_words: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """(words of a gram, strings that have such, hashes): n-grams inside a line, and shorter lines as a whole."""
    words = split_words(block, "letters")
    line = np.searchsorted(np.flatnonzero(words.codes == ord("\n")), words.starts)
    counts = np.bincount(line) if len(line) else np.empty(0, np.int64)
    for length in range(min_words, ngram + 1):
        wanted = counts >= length if length == ngram else counts == length
        grams = gram_hashes(words.hashes, length)
        if wanted.any():
            first, last = line[: len(grams)], line[length - 1 :]
            yield length, int(wanted.sum()), grams[(first == last) & wanted[first]]


def strings(file: Path) -> Iterator[str]:
    """Yield every string of a task file, from whatever depth of its rows."""
    for _, row in read_rows(file):
        yield from _leaves(row)


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
