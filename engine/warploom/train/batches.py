"""What the trainer asks of data, and how a folder of token shards answers. Any other data need only do the same."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from warploom.data.loader import IGNORE_INDEX, Loader, evaluation_batches
from warploom.data.shards import TokenDataset
from warploom.train.config import TrainConfig

_INPUTS = ("cu_seqlens", "positions", "lengths", "source", "source_lengths", "pairs", "reference")


class Batch(Protocol):
    """One micro batch: tokens and targets, (B, T) int64; a target of IGNORE_INDEX counts for nothing.

    It may carry any of the arguments of Transformer.forward under their names: cu_seqlens, positions, lengths, source,
    source_lengths, and those of another loss: pairs, reference; None is as good as absent. Where its loss is no sum
    over targets, num_losses says over how many summands it is.
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

    def train_batches(self, micro_batch_size: int) -> BatchStream: ...
    def heldout_batches(self, micro_batch_size: int) -> Iterable[Batch]:
        """Return the held-out batches, the same at every call.

        Where they have num_bytes, the UTF-8 bytes of text behind their targets, bits per byte are reckoned.
        """


class TokenData:
    """TrainingData over a folder of token shards, cut as the configuration wants it."""

    def __init__(self, dataset: TokenDataset, config: TrainConfig) -> None:
        self._dataset, self._config = dataset, config
        self.num_sequences = self.train_batches(1).windows_per_epoch

    def train_batches(self, micro_batch_size: int) -> Loader:
        return Loader(
            self._dataset.train,
            seq_len=self._config.seq_len,
            micro_batch_size=micro_batch_size,
            seed=self._config.seed,
            separate_documents=self._config.separate_documents,
        )

    def heldout_batches(self, micro_batch_size: int) -> Iterable[Batch]:
        return evaluation_batches(
            self._dataset.heldout,
            seq_len=self._config.seq_len,
            micro_batch_size=micro_batch_size,
            separate_documents=self._config.separate_documents,
            max_windows=math.ceil(self._config.eval_tokens / self._config.seq_len) or None,
        )


def num_losses(batch: Batch) -> int:
    """Return by what the loss of the batch is divided to make it a mean: its targets, or what the batch says."""
    given = getattr(batch, "num_losses", None)
    return int((batch.targets != IGNORE_INDEX).sum()) if given is None else given


def inputs_to(batch: Batch, device: torch.device) -> dict[str, Any]:
    """Return the batch as arguments of the model's loss, on the device."""
    inputs = {name: getattr(batch, name, None) for name in _INPUTS}
    inputs = {"tokens": batch.tokens, "targets": batch.targets, **inputs}
    return {name: x.to(device, non_blocking=True) for name, x in inputs.items() if x is not None}
