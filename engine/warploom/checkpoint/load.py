"""Load checkpoints: every byte is checked against the manifest, nothing is unpickled, tensors come one at a time."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from warploom.checkpoint import format as fmt
from warploom.checkpoint.format import CheckpointDamaged, CheckpointState, CheckpointTooNew, FileRecord, Manifest
from warploom.checkpoint.tensors import DTYPE_CODES, MAX_HEADER_BYTES, Entry, read_header, tensor_bytes
from warploom.errors import UserError

_PIECE_BYTES = 1 << 20

T = TypeVar("T")


def load_checkpoint(
    path: str | os.PathLike[str], *, verify: bool = True, device: torch.device | str = "cpu"
) -> CheckpointState:
    """Load a checkpoint folder. Weights go to device; optimizer and random states stay on the CPU, whence restoring
    moves them, so that the device never holds two copies.

    verify=False skips the checksums (not the structural checks), for a folder that was verified a moment ago.
    Raises CheckpointDamaged naming file and tensor, CheckpointTooNew, or UserError where there is no checkpoint.
    """
    folder = _checkpoint_folder(path)
    manifest = read_manifest(folder)
    if verify:
        _verify_files(folder, manifest)
    state = _load_common(folder, manifest, verify, device)
    state.optimizer = _load_tensors(folder, fmt.OPTIMIZER, manifest, verify, "cpu")
    state.rng = _load_tensors(folder, fmt.RNG, manifest, verify, "cpu")
    return state


def load_weights_only(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> CheckpointState:
    """Load what sampling and evaluation need: weights, meta, tokenizer. Optimizer and random states stay empty, their
    files unread; everything that is read is verified. Errors as load_checkpoint."""
    folder = _checkpoint_folder(path)
    manifest = read_manifest(folder)
    _verify_file(folder, fmt.WEIGHTS, manifest.files[fmt.WEIGHTS])
    return _load_common(folder, manifest, True, device)


def load_latest(
    run_dir: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    on_skip: Callable[[str], None] = warnings.warn,
) -> CheckpointState | None:
    """Load the newest checkpoint of a run that verifies, or return None if the run has none.

    latest_checkpoint and load_checkpoint in one, without verifying twice. Errors as latest_checkpoint.
    """
    return _newest(run_dir, lambda path: load_checkpoint(path, device=device), on_skip)


def latest_checkpoint(run_dir: str | os.PathLike[str], on_skip: Callable[[str], None] = warnings.warn) -> Path | None:
    """Return the newest checkpoint of a run that verifies, by step; None if the run has no checkpoint at all.

    on_skip gets one sentence for each damaged checkpoint passed over. Raises UserError if there are checkpoints and
    none verifies (starting afresh would hide that), CheckpointTooNew if the newest sound one is of a newer format
    (going on from an older one would fork the run).
    """

    def verified(path: Path) -> Path:
        verify_checkpoint(path)
        return path

    return _newest(run_dir, verified, on_skip)


def find_checkpoint(path: str | os.PathLike[str], on_skip: Callable[[str], None] = warnings.warn) -> Path:
    """Return path if it is a checkpoint, or the newest verified checkpoint of the run folder path. Else UserError."""
    folder = _existing_folder(path)
    if (folder / fmt.MANIFEST).exists() or fmt.step_of(folder.name) is not None:
        return folder
    newest = latest_checkpoint(folder, on_skip)
    if newest is None:
        raise UserError(f"{folder} is neither a checkpoint nor a run folder that holds one; name a step-... folder")
    return newest


def checkpoints_at(path: str | os.PathLike[str]) -> list[Path]:
    """Return the checkpoint that path is, or all of the run folder that it is, newest first, unread. Else UserError."""
    folder = _existing_folder(path)
    found = [folder] if (folder / fmt.MANIFEST).exists() else fmt.list_checkpoints(folder)
    if not found:
        raise UserError(f"{folder} is neither a checkpoint nor a run folder that holds one; name a step-... folder")
    return found


def verify_checkpoint(path: str | os.PathLike[str]) -> Manifest:
    """Check every byte of a checkpoint against its manifest. Errors as load_checkpoint."""
    folder = _checkpoint_folder(path)
    manifest = read_manifest(folder)
    _verify_files(folder, manifest)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint, checked against its own checksum but not against the files."""
    data = _read_file(folder, fmt.MANIFEST, MAX_HEADER_BYTES)
    if _read_file(folder, fmt.MANIFEST_DIGEST, MAX_HEADER_BYTES) != fmt.manifest_digest_line(data):
        raise CheckpointDamaged(folder, fmt.MANIFEST, f"does not match its checksum in {fmt.MANIFEST_DIGEST}")
    try:
        manifest = fmt.parse_manifest(data)
    except CheckpointTooNew as error:
        raise CheckpointTooNew(f"checkpoint {folder} cannot be read: {error}") from None
    except ValueError as error:
        raise CheckpointDamaged(folder, fmt.MANIFEST, str(error)) from error
    named = fmt.step_of(folder.name)
    if named is not None and named != manifest.step:
        raise CheckpointDamaged(folder, fmt.MANIFEST, f"is that of step {manifest.step}")
    return manifest


def read_config(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Read the configuration of the run. Errors as load_checkpoint."""
    return _load_json(folder, fmt.CONFIG, manifest, True)


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], on_warning: Callable[[str], None] | None = None
) -> None:
    """Copy weights into a model, whose state_dict must have exactly these names and shapes (dtypes are cast).

    A model on the meta device takes the tensors themselves instead. Raises UserError listing the names and shapes that
    differ. NaN or infinite weights are refused likewise; with on_warning it gets the sentence and they are loaded.
    """
    own = model.state_dict()
    differences = [f"{name} is missing from the checkpoint" for name in own if name not in weights]
    differences += [f"{name} is not in the model" for name in weights if name not in own]
    differences += [
        f"{name} is {tuple(weights[name].shape)} in the checkpoint and {tuple(own[name].shape)} in the model"
        for name in own
        if name in weights and own[name].shape != weights[name].shape
    ]
    if differences:
        raise UserError(
            f"the checkpoint does not fit the model: {fmt.shortened(differences)}; "
            "build the model from the checkpoint's own config.json"
        )
    counts = _count_nonfinite(weights)
    if counts:
        listing = fmt.shortened([f"{name} has {count}" for name, count in counts.items()])
        message = f"the checkpoint holds weights that are NaN or infinite: {listing}; go on from an earlier checkpoint"
        if on_warning is None:
            raise UserError(message)
        on_warning(message)
    model.load_state_dict(weights, assign=any(tensor.is_meta for tensor in own.values()))


def differing_fields(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """List the fields in which two nested configurations differ, as "model.d_model: 64 in the checkpoint, 128 now".

    Tuples equal the lists that JSON makes of them.
    """
    differences = []
    for key in [*saved, *(key for key in current if key not in saved)]:
        old, new = saved.get(key, _ABSENT), current.get(key, _ABSENT)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            differences += [f"{key}.{line}" for line in differing_fields(old, new)]
        elif _as_json(old) != _as_json(new):
            differences.append(f"{key}: {old!r} in the checkpoint, {new!r} now")
    return differences


class _Absent:
    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()


def _as_json(value: Any) -> Any:
    return [_as_json(item) for item in value] if isinstance(value, list | tuple) else value


def _count_nonfinite(weights: Mapping[str, Tensor]) -> dict[str, int]:
    counts = {}
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            # torch has no isfinite for the 8-bit floats.
            counts[name] = int((~torch.isfinite(tensor if tensor.itemsize > 1 else tensor.float())).sum())
    return {name: count for name, count in counts.items() if count}


def _newest(run_dir: str | os.PathLike[str], use: Callable[[Path], T], on_skip: Callable[[str], None]) -> T | None:
    """Return what use makes of the newest checkpoint that it does not find damaged."""
    checkpoints = fmt.list_checkpoints(run_dir)
    for path in checkpoints:
        try:
            return use(path)
        except CheckpointDamaged as error:
            on_skip(f"skipped a checkpoint: {error}")
    if checkpoints:
        raise UserError(
            f"none of the {len(checkpoints)} checkpoints in {run_dir} can be read, each is damaged; "
            "choose another folder to start afresh"
        )
    return None


def _existing_folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{folder} is a file, and a checkpoint is a folder; pickled files (.pt, .bin) are never opened")
    raise UserError(f"there is no checkpoint at {folder}; check the path")


def _checkpoint_folder(path: str | os.PathLike[str]) -> Path:
    folder = _existing_folder(path)
    if not (folder / fmt.MANIFEST).exists() and fmt.step_of(folder.name) is None:
        raise UserError(f"{folder} is not a checkpoint, it has no {fmt.MANIFEST}; name a step-... folder of a run")
    return folder


def _load_common(folder: Path, manifest: Manifest, verify: bool, device: torch.device | str) -> CheckpointState:
    config = _load_json(folder, fmt.CONFIG, manifest, verify)
    state = _load_json(folder, fmt.STATE, manifest, verify)
    if state.get("step") != manifest.step or not isinstance(state.get("meta"), dict):
        raise CheckpointDamaged(folder, fmt.STATE, f"is not the state of step {manifest.step}")
    tokenizer = None
    if fmt.TOKENIZER in manifest.files:
        tokenizer = _read_listed(folder, fmt.TOKENIZER, manifest, verify)
    return CheckpointState(
        step=manifest.step,
        weights=_load_tensors(folder, fmt.WEIGHTS, manifest, verify, device),
        meta={**state["meta"], "config": config},
        tokenizer=tokenizer,
        heldout_loss=manifest.heldout_loss,
    )


def _load_json(folder: Path, name: str, manifest: Manifest, verify: bool) -> dict[str, Any]:
    try:
        value = fmt.parse_json(_read_listed(folder, name, manifest, verify))
    except ValueError as error:
        raise CheckpointDamaged(folder, name, f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointDamaged(folder, name, "is not a JSON object")
    return value


def _read_listed(folder: Path, name: str, manifest: Manifest, verify: bool) -> bytes:
    record = manifest.files[name]
    data = _read_file(folder, name, record.size)
    if len(data) != record.size:
        raise CheckpointDamaged(folder, name, f"has {len(data)} bytes, its manifest says {record.size}")
    if verify and fmt.xxh3_128(data) != record.xxh3_128:
        raise CheckpointDamaged(folder, name, "does not match its checksum")
    return data


def _read_file(folder: Path, name: str, limit: int) -> bytes:
    """Read a file of at most limit bytes."""
    try:
        size = _size_of(folder, name)
        if size > limit:
            raise CheckpointDamaged(folder, name, f"has {size} bytes, {limit} are expected at most")
        return (folder / name).read_bytes()
    except OSError as error:
        raise CheckpointDamaged(folder, name, f"cannot be read: {error.strerror}") from error


def _size_of(folder: Path, name: str) -> int:
    """Return a file's size. A link could lead out of the folder and a pipe would block, so both are refused."""
    try:
        status = os.lstat(folder / name)
    except FileNotFoundError:
        raise CheckpointDamaged(folder, name, "is missing") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointDamaged(folder, name, "is not a regular file")
    return status.st_size


def _verify_files(folder: Path, manifest: Manifest) -> None:
    for name, record in manifest.files.items():
        _verify_file(folder, name, record)


def _verify_file(folder: Path, name: str, record: FileRecord) -> None:
    try:
        size = _size_of(folder, name)
        if size != record.size:
            raise CheckpointDamaged(folder, name, f"has {size} bytes, its manifest says {record.size}")
        if _hash_range(folder / name, 0, size) == record.xxh3_128:
            return
        if record.tensors is None:
            raise CheckpointDamaged(folder, name, "does not match its checksum")
        raise _locate_damage(folder, name, record)
    except OSError as error:
        raise CheckpointDamaged(folder, name, f"cannot be read: {error.strerror}") from error


def _locate_damage(folder: Path, name: str, record: FileRecord) -> CheckpointDamaged:
    """Say which tensor, or the header, makes a tensor file differ from its checksum."""
    assert record.tensors is not None
    try:
        with open(folder / name, "rb") as file:
            entries = read_header(file, record.size)
        _compare_entries(entries, record)
    except ValueError as error:
        return CheckpointDamaged(folder, name, str(error))
    damaged = [
        tensor
        for tensor, entry in entries.items()
        if _hash_range(folder / name, entry.start, entry.end) != record.tensors[tensor].xxh3_128
    ]
    if not damaged:
        return CheckpointDamaged(folder, name, "does not match its checksum, the tensors do: it is the header")
    others = f" (and {len(damaged) - 1} other tensors do not either)" if len(damaged) > 1 else ""
    return CheckpointDamaged(folder, name, "does not match its checksum" + others, tensor=damaged[0])


def _compare_entries(entries: dict[str, Entry], record: FileRecord) -> None:
    assert record.tensors is not None
    if {name: (entry.dtype, entry.shape) for name, entry in entries.items()} != {
        name: (entry.dtype, entry.shape) for name, entry in record.tensors.items()
    }:
        raise ValueError("has a header with other names, dtypes or shapes than its manifest")


def _hash_range(path: Path, start: int, end: int) -> str:
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(min(_PIECE_BYTES, end - start)))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        remaining = end - start
        while remaining:
            count = file.readinto(buffer[: min(len(buffer), remaining)])
            if not count:
                break  # cut off since its size was taken; the digest will differ
            digest.update(buffer[:count])
            remaining -= count
    return digest.hexdigest()


def _load_tensors(
    folder: Path, name: str, manifest: Manifest, verify: bool, device: torch.device | str
) -> dict[str, Tensor]:
    record = manifest.files[name]
    assert record.tensors is not None
    tensors = {}
    try:
        if (size := _size_of(folder, name)) != record.size:
            raise CheckpointDamaged(folder, name, f"has {size} bytes, its manifest says {record.size}")
        with open(folder / name, "rb") as file:
            _compare_entries(read_header(file, record.size), record)
        with safe_open(folder / name, framework="pt") as library:
            for tensor_name, expected in record.tensors.items():
                # The library maps the file: without the copy, a later change of the file would change the weights.
                tensor = library.get_tensor(tensor_name).clone()
                if (DTYPE_CODES[tensor.dtype], tuple(tensor.shape)) != (expected.dtype, expected.shape):
                    raise CheckpointDamaged(folder, name, "was read with another dtype or shape", tensor_name)
                if verify and fmt.xxh3_128(tensor_bytes(tensor)) != expected.xxh3_128:
                    raise CheckpointDamaged(folder, name, "does not match its checksum", tensor_name)
                tensors[tensor_name] = tensor.to(device)
    except OSError as error:
        raise CheckpointDamaged(folder, name, f"cannot be read: {error.strerror}") from error
    except (ValueError, SafetensorError) as error:
        raise CheckpointDamaged(folder, name, str(error)) from error
    return tensors
