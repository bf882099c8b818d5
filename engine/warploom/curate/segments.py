"""Segments on disk: documents, the tags beside them, and arrays, as one task has written them.

    00000.docs.jsonl.zst     id, source, url, text, edits
    00000.tags.jsonl.zst     scores, labels, spans, dropped; line i is of document i
    00000.minhash.npy        an array of every document, end to end
    00000.minhash.offsets.npy   (num_documents + 1,) where each begins

A segment is written under other names and renamed when complete.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from warploom.curate.document import Document
from warploom.curate.optional import optional

_ARRAYS = {"exact": np.uint64, "lines": np.uint64, "minhash": np.uint32, "shingles": np.uint32}


@dataclass(frozen=True)
class Segment:
    """One segment: its files have the stem, its documents the rows first .. first + num_documents of the run."""

    stem: Path
    first: int
    num_documents: int

    def tags(self) -> Iterator[dict[str, Any]]:
        return read_jsonl(self.stem.with_name(self.stem.name + ".tags.jsonl.zst"))

    def documents(self) -> Iterator[dict[str, Any]]:
        return read_jsonl(self.stem.with_name(self.stem.name + ".docs.jsonl.zst"))

    def array(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(values, offsets): document i has values[offsets[i] : offsets[i + 1]]. Mapped into memory."""
        paths = [self.stem.with_name(f"{self.stem.name}.{name}{part}.npy") for part in ("", ".offsets")]
        if not paths[0].exists():
            return np.empty(0, _ARRAYS[name]), np.zeros(self.num_documents + 1, np.int64)
        values, offsets = (np.load(path, mmap_mode="r" if path.stat().st_size > 200 else None) for path in paths)
        return values, offsets

    def column(self, name: str, width: int = 1) -> np.ndarray:
        """(num_documents, width) of an array that has `width` values per document, or none: then zeros."""
        values, offsets = self.array(name)
        present = np.flatnonzero(np.diff(offsets))
        rows = np.zeros((self.num_documents, width), dtype=values.dtype)
        rows[present] = np.asarray(values).reshape(len(present), width)
        return rows


def write_segment(stem: Path, documents: Iterable[Document]) -> int:
    """Write a segment and return its number of documents."""
    arrays: dict[str, tuple[list[np.ndarray], list[int]]] = {}
    count = 0
    names = [stem.with_name(f"{stem.name}.{kind}.jsonl.zst") for kind in ("docs", "tags")]
    with JsonlWriter(names[0]) as texts, JsonlWriter(names[1]) as tags:
        for document in documents:
            texts.write(
                {
                    "id": document.id,
                    "source": document.source,
                    "url": document.url,
                    "text": document.text,
                    "edits": document.edits,
                }
            )
            tags.write(
                {
                    "scores": document.scores,
                    "labels": document.labels,
                    "spans": document.spans,
                    "dropped": document.dropped,
                    "bytes": len(document.text.encode("utf-8")),
                    "source": document.source,
                    "url": document.url,
                    "id": document.id,
                }
            )
            for name, values in document.arrays.items():
                parts, offsets = arrays.setdefault(name, ([], [0] * (count + 1)))
                offsets += [offsets[-1]] * (count + 1 - len(offsets))
                parts.append(values)
                offsets.append(offsets[-1] + len(values))
            count += 1
    for name, (parts, offsets) in arrays.items():
        offsets += [offsets[-1]] * (count + 1 - len(offsets))
        write_array(stem.with_name(f"{stem.name}.{name}.npy"), np.concatenate(parts))
        write_array(stem.with_name(f"{stem.name}.{name}.offsets.npy"), np.array(offsets, np.int64))
    return count


class JsonlWriter:
    """Writes JSON lines, compressed; the file has its name only once it is complete."""

    def __init__(self, path: Path):
        self._orjson = optional("orjson")
        self._path, self._partial = path, path.with_name(path.name + ".partial")

    def __enter__(self) -> JsonlWriter:
        self._file = open(self._partial, "wb")
        self._stream = zstandard.ZstdCompressor(level=3).stream_writer(self._file, closefd=False)
        return self

    def write(self, row: dict[str, Any]) -> None:
        self._stream.write(self._orjson.dumps(row, option=self._orjson.OPT_SERIALIZE_NUMPY) + b"\n")

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._stream.close()
        self._file.close()
        if kind is None:
            os.replace(self._partial, self._path)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file that JsonlWriter wrote."""
    orjson = optional("orjson")
    with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        for line in io.BufferedReader(stream, 1 << 18):
            yield orjson.loads(line)


def write_array(path: Path, values: np.ndarray) -> None:
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        np.save(file, values)
    os.replace(partial, path)


def write_json(path: Path, value: object) -> None:
    """Write JSON for people, under another name until it is complete."""
    orjson = optional("orjson")
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY))
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    return optional("orjson").loads(path.read_bytes())
