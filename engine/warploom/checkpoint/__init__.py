"""Checkpoints: folders that survive kills and power loss, verify every byte and are read without unpickling.

format.py      the files of a checkpoint, exactly; CheckpointState, CheckpointDamaged
tensors.py     the safetensors container: header, checks, checksums
save.py        save_checkpoint: write aside, fsync, rename
load.py        load_checkpoint, load_weights_only, latest_checkpoint, verify_checkpoint; load_weights into a model
retention.py   apply_retention: keep the last and the best
optimizer.py   torch optimizer state <-> flat tensors named by parameter
rng.py         every random state of the process
environment.py what bitwise resume depends on beside the checkpoint
lock.py        one trainer per run folder
"""

from warploom.checkpoint.format import CheckpointDamaged, CheckpointState, CheckpointTooNew, list_checkpoints
from warploom.checkpoint.load import (
    differing_fields,
    find_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    load_latest,
    load_weights,
    load_weights_only,
    verify_checkpoint,
)
from warploom.checkpoint.lock import FolderLock
from warploom.checkpoint.optimizer import flatten_optimizer, restore_optimizer
from warploom.checkpoint.retention import apply_retention
from warploom.checkpoint.save import SaveFailed, save_checkpoint, sweep

__all__ = [
    "CheckpointDamaged",
    "CheckpointState",
    "CheckpointTooNew",
    "FolderLock",
    "SaveFailed",
    "apply_retention",
    "differing_fields",
    "find_checkpoint",
    "flatten_optimizer",
    "latest_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_latest",
    "load_weights",
    "load_weights_only",
    "restore_optimizer",
    "save_checkpoint",
    "sweep",
    "verify_checkpoint",
]
