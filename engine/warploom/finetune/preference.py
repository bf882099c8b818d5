"""Direct preference optimization (Rafailov et al., 2023) on pairs of a chosen and a rejected answer.

    loss = -log sigmoid(beta ((log p(chosen) - log p_base(chosen)) - (log p(rejected) - log p_base(rejected))))

A log-probability is the sum over an answer's tokens. Those of the base are computed once, before the training.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from warploom.data.loader import IGNORE_INDEX
from warploom.finetune.data import ExampleData, Side
from warploom.finetune.packing import PackedBatch
from warploom.models.transformer import Transformer
from warploom.train.batches import inputs_to

# Logits held at a time, float32: 16 MiB.
_CHUNK_ELEMENTS = 1 << 22


class PreferenceLoss:
    """The sum of the losses of a batch's pairs, as the trainer's loss_sum."""

    def __init__(self, model: Transformer, beta: float) -> None:
        self._model, self._beta = model, beta

    def __call__(self, tokens: Tensor, targets: Tensor, pairs: Tensor, reference: Tensor, **inputs: Tensor) -> Tensor:
        found = answer_log_probs(self._model, tokens, targets, **inputs)[pairs]  # (P, 2)
        return -F.logsigmoid(self._beta * margins(found, reference)).sum()


def margins(log_probs: Tensor, reference: Tensor) -> Tensor:
    """By how much more the model has come to favour the chosen side than the rejected, nats; all (P, 2) -> (P,)."""
    gained = log_probs - reference
    return gained[:, 0] - gained[:, 1]


def answer_log_probs(
    model: Transformer, tokens: Tensor, targets: Tensor, *, cu_seqlens: Tensor, positions: Tensor
) -> Tensor:
    """Return the summed log-probability of the targets of each of the n examples of cu_seqlens, (n,) float32."""
    hidden = model(tokens, cu_seqlens=cu_seqlens, positions=positions).flatten(0, 1)  # (B * T, C)
    targets = targets.flatten()
    answers = (targets != IGNORE_INDEX).nonzero()[:, 0]
    owner = torch.searchsorted(cu_seqlens[1:].long(), answers, right=True)
    rows = max(1, _CHUNK_ELEMENTS // model.config.vocab_size)
    found = hidden.new_zeros(len(cu_seqlens) - 1, dtype=torch.float32)
    for part in answers.split(rows):
        # Logits are made again in the backward pass: those of a whole batch may not fit.
        losses = checkpoint(_token_losses, model, hidden[part], targets[part], use_reentrant=False)
        found = found.index_add(0, owner[: len(part)], -losses)
        owner = owner[len(part) :]
    return found


def _token_losses(model: Transformer, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model.logits(hidden).float(), targets, reduction="none")


@torch.no_grad()
def pair_log_probs(model: Transformer, data: ExampleData, side: Side, micro_batch_size: int) -> np.ndarray:
    """Return the log-probabilities of a side's pairs under the model, (units, 2) float32."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    found = np.zeros((len(side.units), 2), dtype=np.float32)
    order = [unit for row in side.rows for unit in row]
    blank = Side(side.units, side.rows, found)  # of this, only where the pairs stand is read
    done = 0
    for batch in data.batches(blank, micro_batch_size):
        assert isinstance(batch, PackedBatch) and batch.pairs is not None
        inputs = inputs_to(batch, device)
        pairs = inputs.pop("pairs")
        inputs.pop("reference")
        values = answer_log_probs(model, **inputs)[pairs].cpu().numpy()
        found[order[done : done + len(values)]] = values
        done += len(values)
    model.train(was_training)
    return found


def set_reference(model: Transformer, data: ExampleData, path: Path, identity: str, micro_batch_size: int) -> bool:
    """Give data the base's log-probabilities, from the file at path if it holds those of this identity (base, data and
    compute type), else computed and written there. Returns whether they were computed."""
    key = f"{identity} {data.fingerprint}"
    if path.exists():
        values = load_file(path)
        if bytes(values.pop("identity")).decode() == key:
            data.set_reference(values["train"], values["heldout"])
            return False
    train, heldout = (pair_log_probs(model, data, side, micro_batch_size) for side in (data.train, data.heldout))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")  # a kill while it is written must leave no half of it
    save_file({"identity": np.frombuffer(key.encode(), dtype=np.uint8), "train": train, "heldout": heldout}, aside)
    aside.replace(path)
    data.set_reference(train, heldout)
    return True


def preference_accuracy(model: Transformer, data: ExampleData, micro_batch_size: int) -> float:
    """Return the share of held-out pairs whose chosen side gained more over the base than the rejected one."""
    assert data.heldout.reference is not None
    found = pair_log_probs(model, data, data.heldout, micro_batch_size)
    gained = margins(torch.from_numpy(found), torch.from_numpy(data.heldout.reference))
    return float((gained > 0).float().mean())
