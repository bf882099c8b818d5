"""Loss, perplexity and bits per byte of a trained model on a held-out split, or on any text."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from warploom.data.documents import read_documents
from warploom.data.loader import IGNORE_INDEX, evaluation_batches
from warploom.data.shards import TokenDataset
from warploom.data.tokenizer import Tokenizer
from warploom.errors import UserError
from warploom.train.batches import Batch
from warploom.train.heldout import HeldoutLoss, heldout_loss
from warploom.train.load_model import LoadedModel


@dataclass(frozen=True)
class TextWindows:
    """Windows of one or more documents, each document apart: tokens and targets (B, T) int64, and the UTF-8 bytes of
    text behind the targets that count."""

    tokens: Tensor
    targets: Tensor
    num_bytes: int


def evaluate(
    loaded: LoadedModel,
    data: Sequence[str | Path] = (),
    *,
    seq_len: int | None = None,
    batch_size: int = 16,
) -> HeldoutLoss:
    """Measure a model on the held-out split of a folder of token shards, or on all of the given text.

    data: one folder of token shards, whose tokenizer must be the model's; or files, folders or globs of text, read
    whole; or nothing, which takes the token shards of the model's own run. seq_len: tokens the model may look back
    at most, its training length if None. Windows do not overlap, so their first tokens are predicted from little.
    Raises UserError if there is no such data.
    """
    if loaded.tokenizer is None:
        raise UserError(f"{loaded.path} holds no tokenizer; its loss on text cannot be measured")
    seq_len = loaded.config.train.seq_len if seq_len is None else seq_len
    if not 1 <= seq_len <= loaded.config.model.max_seq_len:
        raise UserError(f"seq-len is {seq_len}; give 1 to {loaded.config.model.max_seq_len}, the model's context")
    folder = Path(data[0]) if len(data) == 1 else loaded.path.parent / "data"
    batches: Iterable[Batch]
    if (folder / "manifest.json").is_file() and len(data) <= 1:
        dataset = TokenDataset(folder)
        dataset.require_tokenizer(loaded.tokenizer)
        batches = evaluation_batches(
            dataset.heldout,
            seq_len=seq_len,
            micro_batch_size=batch_size,
            separate_documents=loaded.config.train.separate_documents,
        )
    elif data:
        batches = text_windows(loaded.tokenizer, list(data), seq_len, batch_size)
    else:
        raise UserError(
            f"the run of {loaded.path} keeps no token shards in {folder}; name text to evaluate with --data"
        )
    loss_sum = functools.partial(loaded.model.loss, reduction="sum")
    found = heldout_loss(loss_sum, batches, next(loaded.model.parameters()).device)
    assert found is not None  # nothing asked it to stop
    return found


def text_windows(
    tokenizer: Tokenizer, paths: Sequence[str | Path], seq_len: int, batch_size: int
) -> Iterator[TextWindows]:
    """Yield every document as windows: what begins a text and its tokens in, its tokens and <|endoftext|> out.

    A model whose texts begin without a token predicts the first one from the end of another text, <|endoftext|>.
    """
    begin = list(tokenizer.begin_ids) or [tokenizer.eos_id]
    rows: list[tuple[list[int], int]] = []  # token ids, and how many of them are given before the first target
    num_bytes = 0
    for _, document in read_documents(list(paths)):
        ids = [*begin, *tokenizer.encode(document), tokenizer.eos_id]
        num_bytes += len(document.encode("utf-8"))
        for start in range(0, len(ids) - 1, seq_len):
            rows.append((ids[start : start + seq_len + 1], len(begin) if start == 0 else 1))
            if len(rows) == batch_size:
                yield _stack(rows, num_bytes)
                rows, num_bytes = [], 0
    if rows:
        yield _stack(rows, num_bytes)


def _stack(rows: list[tuple[list[int], int]], num_bytes: int) -> TextWindows:
    T = max(len(row) for row, _ in rows) - 1
    tokens = torch.zeros(len(rows), T, dtype=torch.int64)
    targets = torch.full((len(rows), T), IGNORE_INDEX)
    for b, (row, num_given) in enumerate(rows):
        tokens[b, : len(row) - 1] = torch.tensor(row[:-1])
        targets[b, num_given - 1 : len(row) - 1] = torch.tensor(row[num_given:])
    return TextWindows(tokens, targets, num_bytes)
