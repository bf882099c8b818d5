"""What the trainer asks of data, and how a folder of token shards answers. Any other data need only do the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from warploom.data.loader import Loader
from warploom.data.shards import TokenDataset
from warploom.train.config import TrainConfig

IGNORE_INDEX = -100
_INPUTS = ("cu_seqlens", "positions", "lengths", "source", "source_lengths")


class Batch(Protocol):
    """One micro batch: tokens and targets, (B, T) int64; a target of IGNORE_INDEX counts for nothing.

    It may carry any of the arguments of Transformer.forward under their names: cu_seqlens, positions, lengths, source,
    source_lengths; None is as good as absent.
    """

    @property
    def tokens(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...


class BatchStream(Protocol):
    """Micro batches without end, in an order that its state, plain JSON values, takes up again."""

    def __next__(self) -> Batch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TrainingData(Protocol):
    """A training and a held-out split."""

    @property
    def num_sequences(self) -> int:
        """Sequences in one pass over the training split."""

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of held-out text behind a token, for bits per byte; nan where that means nothing."""

    def train_batches(self, micro_batch_size: int) -> BatchStream: ...
    def heldout_batches(self, micro_batch_size: int) -> Iterable[Batch]:
        """The held-out batches, the same at every call."""


class TokenData:
    """TrainingData over a folder of token shards, as the configuration wants it cut."""

    def __init__(self, dataset: TokenDataset, config: TrainConfig) -> None:
        self._dataset, self._config = dataset, config
        self.num_sequences = self._loader(dataset.train, 1, shuffle=True).windows_per_epoch
        self.bytes_per_token = dataset.heldout.num_bytes / max(1, dataset.heldout.num_tokens)

    def train_batches(self, micro_batch_size: int) -> Loader:
        return self._loader(self._dataset.train, micro_batch_size, shuffle=True)

    def heldout_batches(self, micro_batch_size: int) -> Iterable[Batch]:
        windows = self._loader(self._dataset.heldout, 1, shuffle=False).windows_per_epoch
        if self._config.eval_tokens:
            windows = min(windows, -(-self._config.eval_tokens // self._config.seq_len))
        size = min(micro_batch_size, windows)
        return itertools.islice(self._loader(self._dataset.heldout, size, shuffle=False), windows // size)

    def _loader(self, split: Any, micro_batch_size: int, *, shuffle: bool) -> Loader:
        return Loader(
            split,
            seq_len=self._config.seq_len,
            micro_batch_size=micro_batch_size,
            seed=self._config.seed,
            shuffle=shuffle,
            separate_documents=self._config.separate_documents,
        )


def inputs_to(batch: Batch, device: torch.device) -> dict[str, Any]:
    """Return the batch as arguments of the model's loss, on the device."""
    inputs = {name: getattr(batch, name, None) for name in _INPUTS}
    inputs = {"tokens": batch.tokens, "targets": batch.targets, **inputs}
    return {name: x.to(device, non_blocking=True) for name, x in inputs.items() if x is not None}
