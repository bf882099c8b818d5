"""From a checkpoint folder to the model, its tokenizer and its configuration: the folder alone is enough, and that of
an adapter names the base that it needs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from warploom.checkpoint.format import WEIGHTS, CheckpointState
from warploom.checkpoint.load import find_checkpoint, load_weights, load_weights_only, read_manifest
from warploom.data.chat import ChatTemplate
from warploom.data.tokenizer import Tokenizer
from warploom.errors import UserError
from warploom.models.transformer import Transformer
from warploom.nn.linear import keep_packed
from warploom.nn.lora import LoRAConfig, add_lora, bake_lora
from warploom.train.config import RunConfig, from_dict
from warploom.train.run_state import restore_weights

# Entries of a checkpoint's meta, beside the trainer's own.
ADAPTER = "adapter"  # {"lora": a LoRAConfig, "base": {"path", "weights": the checksum of its weights}}
CHAT_TEMPLATE = "chat_template"  # the source of a ChatTemplate


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
    """Of the run when the checkpoint was written; the configured one where the checkpoint is not of a run."""
    heldout_loss: float | None
    """As measured when the checkpoint was written, nats per token."""
    chat_template: ChatTemplate | None = None
    """None if the model was not tuned on conversations."""


def load_model(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    base: str | os.PathLike[str] | None = None,
    on_skip: Callable[[str], None] = warnings.warn,
) -> LoadedModel:
    """Load a checkpoint folder, or the newest sound checkpoint of a run folder; every byte read is verified.

    dtype: the model's compute_dtype. The weights stay in float32; for another dtype what products read of them is kept
    beside them from the first use on, which takes half as much memory again for 16 bits.
    An adapter is loaded onto base, or onto the base it was trained on where that still lies where it did, and merged.
    on_skip gets one sentence per damaged checkpoint passed over. Raises UserError if there is none, and if the base of
    an adapter is not to be found or is another.
    """
    folder = find_checkpoint(path, on_skip)
    state = load_weights_only(folder, device=device)
    config = RunConfig.from_dict(state.meta["config"])
    tokenizer = None if state.tokenizer is None else Tokenizer.from_bytes(state.tokenizer)
    template = state.meta.get(CHAT_TEMPLATE)
    if ADAPTER in state.meta:
        model = _adapted(folder, state, device, base)
    elif base is not None:
        raise UserError(f"{folder} is a whole model and needs no base; leave {base} out")
    else:
        with torch.device("meta"):
            model = Transformer(config.model)
        load_weights(model, state.weights)
    model.compute_dtype = dtype
    if dtype != torch.float32:
        keep_packed(model)
    return LoadedModel(
        model.eval(),
        tokenizer,
        config,
        folder,
        state.step,
        state.meta.get("progress", {}).get("micro_batch_size", config.train.micro_batch_size),
        state.heldout_loss,
        None if template is None else ChatTemplate(template),
    )


def base_record(checkpoint: Path) -> dict[str, str]:
    """Return what an adapter's checkpoint says of its base, so that it is found and known again."""
    return {"path": str(checkpoint.resolve()), "weights": read_manifest(checkpoint).checksum(WEIGHTS)}


def _adapted(
    folder: Path, state: CheckpointState, device: torch.device | str, base: str | os.PathLike[str] | None
) -> Transformer:
    adapter: dict[str, Any] = state.meta[ADAPTER]
    expected = adapter["base"]
    if base is None and not Path(expected["path"]).is_dir():
        raise UserError(f"{folder} is an adapter, and its base is no longer at {expected['path']}; name it as the base")
    base = find_checkpoint(expected["path"] if base is None else base)
    if base_record(base)["weights"] != expected["weights"]:
        raise UserError(f"{folder} is an adapter of {expected['path']}, and {base} holds other weights; name its base")
    model = load_model(base, device=device).model
    add_lora(model, from_dict(LoRAConfig, adapter["lora"]))
    restore_weights(model, state.weights)
    bake_lora(model)
    return model.requires_grad_(True)
