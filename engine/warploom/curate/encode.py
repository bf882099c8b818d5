"""Token ids of the kept text, task by task, and the tokenizer they are made with."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from warploom.curate.pipeline import Tokens
from warploom.curate.segments import read_jsonl, write_array
from warploom.data.survey import SAMPLE_BYTES
from warploom.data.token_files import TokenFileWriter, token_dtype
from warploom.data.tokenizer import Tokenizer

_BATCH_BYTES = 1 << 18


def learn_tokenizer(config: Tokens, folder: Path) -> Tokenizer:
    """The tokenizer that is named, or one trained on the text in folder: all of it, or the documents with the lowest
    hashes if it has more than SAMPLE_BYTES."""
    if config.tokenizer is not None:
        return Tokenizer.load(config.tokenizer)
    files = sorted(folder.glob("*.jsonl.zst"))
    total = sum(len(row["text"]) for file in files for row in read_jsonl(file))
    threshold = min(1.0, SAMPLE_BYTES / max(total, 1)) * 2**64

    def sample() -> Iterator[str]:
        for file in files:
            for row in read_jsonl(file):
                if xxhash.xxh3_64_intdigest(row["id"].encode()) < threshold:
                    yield row["text"]

    return Tokenizer.train(sample(), config.vocab_size)


def encode_task(cut_dir: Path, name: str) -> dict[str, Any]:
    """Encode one task's text of each side into encode/<side>/<name>.tokens and <name>.meta.npy.

    meta: (num_documents, 4) int64: row, number of tokens, bytes of text, size of the cluster. Returns the number of
    tokens of each side. Memory is bounded by the largest document and some tens of bytes per document.
    """
    tokenizer = Tokenizer.load(cut_dir / "learn" / "tokenizer.json")
    totals = {}
    for side in ("train", "heldout"):
        folder = cut_dir / "encode" / side
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.tokens"
        path.unlink(missing_ok=True)  # of a worker that was killed
        writer = TokenFileWriter(path, token_dtype(tokenizer.vocab_size))
        meta = [np.empty((0, 4), np.int64)]
        try:
            for texts, rows in _batches(cut_dir / "write" / side / f"{name}.jsonl.zst"):
                encoded = tokenizer.encode_batch(texts)
                lengths = list(map(len, encoded))
                writer.append(np.fromiter(chain.from_iterable(encoded), writer.dtype, sum(lengths)))
                sizes = [len(text) if text.isascii() else len(text.encode("utf-8")) for text in texts]
                places = [(row["row"], row["cluster_size"]) for row in rows]
                numbers, clusters = zip(*places, strict=True)
                meta.append(np.array([numbers, lengths, sizes, clusters], np.int64).T)
            totals[side] = writer.close()["count"]
        finally:
            writer.abandon()
        write_array(folder / f"{name}.meta.npy", np.concatenate(meta))
    return totals


def _batches(path: Path) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
    texts: list[str] = []
    rows: list[dict[str, Any]] = []
    size = 0
    for row in read_jsonl(path):
        texts.append(row.pop("text"))
        rows.append(row)
        size += len(texts[-1])
        if size >= _BATCH_BYTES:
            yield texts, rows
            texts, rows, size = [], [], 0
    if texts:
        yield texts, rows
