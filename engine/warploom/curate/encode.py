"""Token ids of the kept text, task by task, and the tokenizer they are made with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from warploom.curate.pipeline import Tokens
from warploom.curate.segments import read_jsonl, write_array
from warploom.data.survey import SAMPLE_BYTES
from warploom.data.token_files import token_dtype
from warploom.data.tokenizer import Tokenizer

_BATCH_BYTES = 1 << 20


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
    """Encode one task's text of each side into encode/<side>/<name>.ids.npy and .meta.npy.

    meta: (num_documents, 4) int64: row, number of tokens, bytes of text, size of the cluster.
    """
    tokenizer = Tokenizer.load(cut_dir / "learn" / "tokenizer.json")
    totals = {}
    for side in ("train", "heldout"):
        folder = cut_dir / "encode" / side
        folder.mkdir(parents=True, exist_ok=True)
        ids: list[np.ndarray] = []
        meta: list[tuple[int, int, int, int]] = []
        for texts, rows in _batches(cut_dir / "write" / side / f"{name}.jsonl.zst"):
            for row, text, tokens in zip(rows, texts, tokenizer.encode_batch(texts), strict=True):
                ids.append(np.array(tokens, token_dtype(tokenizer.vocab_size)))
                meta.append((row["row"], len(tokens), len(text.encode("utf-8")), row["cluster_size"]))
        flat = np.concatenate([np.empty(0, token_dtype(tokenizer.vocab_size)), *ids])
        write_array(folder / f"{name}.ids.npy", flat)
        write_array(folder / f"{name}.meta.npy", np.array(meta, np.int64).reshape(-1, 4))
        totals[side] = len(flat)
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
