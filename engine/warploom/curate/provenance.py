"""From a training token back to where it came from: file, record, and the steps that changed its document."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from warploom.curate.segments import read_json, read_jsonl
from warploom.data.dataset import TokenDataset
from warploom.data.loader import Loader
from warploom.errors import UserError


@dataclass(frozen=True)
class Origin:
    """file and record: where the document was read; offset: of the token in the document, 0 for its <|endoftext|>;
    epoch: how often the mix had shown the document before."""

    file: str
    record: int
    url: str
    source: str
    edits: tuple[str, ...]
    steps: tuple[str, ...]
    epoch: int
    offset: int


def trace(folder: Path, token: int, side: Literal["train", "heldout"] = "train") -> Origin:
    """Tell where the token of that number, in the shards of a run, comes from.

    Raises UserError if the run wrote no tokens or has not so many.
    """
    dataset = _dataset(folder)
    split = dataset.train if side == "train" else dataset.heldout
    if not 0 <= token < split.num_tokens:
        raise UserError(f"token {token} is not among the {split.num_tokens:,} of the {split.name} side")
    slot = int(np.searchsorted(split.document_starts, token, side="right")) - 1
    row, epoch = np.load(folder / "provenance" / f"{side}.npy")[slot].tolist()
    steps = tuple(step["name"] for step in read_json(folder / "manifest.json")["settings"]["steps"])
    for entry in read_jsonl(folder / "documents.jsonl.zst"):
        if entry["row"] == row:
            file, _, record = entry["id"].rpartition(":")
            offset = token - int(split.document_starts[slot])
            edits = tuple(entry["edits"])
            return Origin(file, int(record), entry["url"], entry["source"], edits, steps, epoch, offset)
    raise UserError(f"documents.jsonl.zst in {folder} has no row {row}: it is damaged; run the pipeline again")


def seen_mix(folder: Path, num_samples: int, *, seq_len: int, seed: int, shuffle: bool = True) -> dict[str, float]:
    """Share of each source among the tokens that the first num_samples windows of a training run have shown.

    seq_len, seed, shuffle: the loader's; a window is one sequence of a batch. Raises UserError as trace does.
    """
    dataset = _dataset(folder)
    split = dataset.train
    loader = Loader(split, seq_len=seq_len, micro_batch_size=1, seed=seed, shuffle=shuffle)
    rows = np.load(folder / "provenance" / "train.npy")[:, 0]
    source_of_row = {entry["row"]: entry["source"] for entry in read_jsonl(folder / "documents.jsonl.zst")}
    sources = sorted(set(source_of_row.values()))
    source_of_slot = np.array([sources.index(source_of_row[row]) for row in rows.tolist()])
    # Tokens of each source before each document, so that a window's shares are differences.
    borders = np.append(split.document_starts, split.num_tokens).astype(np.int64)
    before = np.zeros((len(sources), len(borders)), np.int64)
    for source in range(len(sources)):
        before[source, 1:] = np.cumsum(np.diff(borders) * (source_of_slot == source))

    def up_to(token: np.ndarray) -> np.ndarray:
        slot = np.minimum(np.searchsorted(borders, token, side="right") - 1, len(source_of_slot) - 1)
        inside = (token - borders[slot]) * (source_of_slot[slot] == np.arange(len(sources))[:, None])
        return before[:, slot] + inside

    seen = np.zeros(len(sources), np.int64)
    for starts in _starts(loader, num_samples):
        ends = starts + seq_len
        wrapped = np.maximum(ends - split.num_tokens, 0)
        seen += (up_to(np.minimum(ends, split.num_tokens)) - up_to(starts) + up_to(wrapped)).sum(axis=1)
    return {source: float(seen[index] / max(seen.sum(), 1)) for index, source in enumerate(sources)}


def _starts(loader: Loader, num_samples: int) -> Iterator[np.ndarray]:
    while num_samples > 0:
        starts = loader.next_starts()[:num_samples]
        num_samples -= len(starts)
        yield starts


def _dataset(folder: Path) -> TokenDataset:
    if not (folder / "provenance").is_dir():
        raise UserError(f"{folder} has no tokens with a provenance; give the pipeline a [tokens] table and run it")
    return TokenDataset(folder / "tokens")


def documents_of(folder: Path) -> Iterator[dict[str, Any]]:
    """The kept training documents of a run."""
    files = sorted((folder / "train").glob("*.jsonl.zst"))
    if not files:
        raise UserError(f"{folder} holds no finished run: no train/ there")
    for file in files:
        yield from read_jsonl(file)
