"""apply_retention: delete old checkpoints, but never one that the run may still need."""

from __future__ import annotations

import math
import os
from pathlib import Path

from warploom.checkpoint.format import CheckpointDamaged, CheckpointTooNew, list_checkpoints
from warploom.checkpoint.load import read_manifest, verify_checkpoint
from warploom.checkpoint.save import SaveFailed, discard, is_remembered, remember


def apply_retention(run_dir: str | os.PathLike[str], keep_last: int = 2, keep_best: int = 1) -> list[Path]:
    """Delete all checkpoints of a run but the newest keep_last and the keep_best of lowest held-out loss; return them.

    Only checkpoints that verify count as kept, so nothing is deleted before keep_last sound ones are there. A damaged
    one stays until it is older than these; one of a newer format is never touched. What this process wrote, and nobody
    changed since, is not read again.
    Raises ValueError for keep_last < 1 or keep_best < 0, SaveFailed if a folder cannot be deleted.
    """
    if keep_last < 1 or keep_best < 0:
        raise ValueError(f"keep_last must be at least 1 and keep_best at least 0, got {keep_last} and {keep_best}")
    last: list[Path] = []
    older: list[Path] = []
    for path in list_checkpoints(run_dir):
        if len(last) == keep_last:
            older.append(path)
        elif _is_sound(path):
            last.append(path)
    losses = _heldout_losses([*last, *older])
    best: list[Path] = []
    for path in sorted((path for path in losses if losses[path] < math.inf), key=losses.__getitem__):
        if len(best) < keep_best and (path in last or _is_sound(path)):
            best.append(path)
    doomed = [path for path in older if path in losses and path not in best]
    for path in reversed(doomed):
        try:
            discard(path)
        except OSError as error:
            raise SaveFailed(f"the old checkpoint {path} could not be deleted: {error.strerror}; delete it") from error
    return doomed


def _is_sound(path: Path) -> bool:
    if is_remembered(path):
        return True
    try:
        verify_checkpoint(path)
    except (CheckpointDamaged, CheckpointTooNew):
        return False
    remember(path)
    return True


def _heldout_losses(checkpoints: list[Path]) -> dict[Path, float]:
    """Held-out loss by checkpoint, infinite where there is none; without those of a newer format."""
    losses = {}
    for path in checkpoints:
        try:
            loss = read_manifest(path).heldout_loss
        except CheckpointDamaged:
            loss = None
        except CheckpointTooNew:
            continue
        losses[path] = math.inf if loss is None else loss
    return losses
