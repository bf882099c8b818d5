"""From a checkpoint folder to the model, its tokenizer and its configuration: the folder alone is enough."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from warploom.checkpoint.load import find_checkpoint, load_weights, load_weights_only
from warploom.data.tokenizer import Tokenizer
from warploom.models.transformer import Transformer
from warploom.train.config import RunConfig


@dataclass(frozen=True)
class LoadedModel:
    """A trained model, in evaluation mode."""

    model: Transformer
    tokenizer: Tokenizer | None
    """None if the run was not trained on text."""
    config: RunConfig
    path: Path
    """The step-... folder it came from."""
    step: int
    micro_batch_size: int
    """Of the run when the checkpoint was written."""
    heldout_loss: float | None
    """As measured when the checkpoint was written, nats per token."""


def load_model(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    on_skip: Callable[[str], None] = warnings.warn,
) -> LoadedModel:
    """Load a checkpoint folder, or the newest sound checkpoint of a run folder; every byte read is verified.

    on_skip gets one sentence per damaged checkpoint passed over. Raises UserError if there is none.
    """
    folder = find_checkpoint(path, on_skip)
    state = load_weights_only(folder, device=device)
    config = RunConfig.from_dict(state.meta["config"])
    with torch.device("meta"):
        model = Transformer(config.model)
    load_weights(model, state.weights)
    tokenizer = None if state.tokenizer is None else Tokenizer.from_bytes(state.tokenizer)
    micro = state.meta["progress"]["micro_batch_size"]
    return LoadedModel(model.eval(), tokenizer, config, folder, state.step, micro, state.heldout_loss)
