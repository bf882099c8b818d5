"""Load checkpoints: every byte is checked against the manifest, nothing is unpickled, tensors come one at a time."""

from __future__ import annotations

import math
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from warploom.checkpoint import format as fmt
from warploom.checkpoint.format import CheckpointDamaged, CheckpointState, CheckpointTooNew, Manifest, TensorRecord
from warploom.checkpoint.tensors import DTYPE_CODES, DTYPES, MAX_HEADER_BYTES, Entry, parse_header, tensor_bytes
from warploom.errors import UserError

_PIECE_BYTES = 1 << 20

T = TypeVar("T")

Take = Callable[[str, str, tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]] | None]
"""Which part of a tensor is wanted: (kind, one of format.TENSOR_KINDS; name; whole shape) to where the part begins and
its shape, None for no part."""


def everything(kind: str, name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Take whole tensors."""
    return (0,) * len(shape), shape


def load_checkpoint(
    path: str | os.PathLike[str], *, verify: bool = True, device: torch.device | str = "cpu"
) -> CheckpointState:
    """Load a checkpoint folder, whole, on however many processes it was written. Weights go to device; optimizer and
    random states stay on the CPU, whence restoring moves them, so that the device never holds two copies.

    verify=False skips the checksums (not the structural checks), for a folder that was verified a moment ago.
    Raises CheckpointDamaged naming file and tensor, CheckpointTooNew, or UserError where there is no checkpoint.
    """
    folder = _checkpoint_folder(path)
    manifest = read_manifest(folder)
    if verify:
        verify_files(folder, manifest)
    return load_part(folder, manifest, everything, verify=verify, device=device)


def load_part(
    folder: Path, manifest: Manifest, take: Take, *, verify: bool = True, device: torch.device | str = "cpu"
) -> CheckpointState:
    """Load what take wants of the tensors, and all else. Only the parts in which some of that lies are read, each
    checked as a whole; places says which of the loaded tensors are parts of what. Errors as load_checkpoint.
    """
    state = _load_common(folder, manifest, verify, device, take)
    state.optimizer = _load_tensors(folder, fmt.OPTIMIZER, manifest, verify, "cpu", take)
    state.rng = _load_tensors(folder, fmt.RNG, manifest, verify, "cpu", take)
    return state


def load_weights_only(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> CheckpointState:
    """Load what sampling and evaluation need: weights, meta, tokenizer. Optimizer and random states stay empty, their
    files unread; everything that is read is verified. Errors as load_checkpoint."""
    folder = _checkpoint_folder(path)
    manifest = read_manifest(folder)
    verify_files(folder, manifest, [name for name in manifest.files if fmt.kind_of(name) == fmt.WEIGHTS])
    return _load_common(folder, manifest, True, device, everything)


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
    verify_files(folder, manifest)
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
    refuse_other_shapes(model, {name: tuple(tensor.shape) for name, tensor in weights.items()})
    refuse_nonfinite(count_nonfinite(weights), on_warning)
    model.load_state_dict(weights, assign=any(tensor.is_meta for tensor in model.state_dict().values()))


def refuse_other_shapes(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError listing what differs unless these are the names and shapes of the model's state_dict."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    differences = [f"{name} is missing from the checkpoint" for name in own if name not in shapes]
    differences += [f"{name} is not in the model" for name in shapes if name not in own]
    differences += [
        f"{name} is {tuple(shapes[name])} in the checkpoint and {shape} in the model"
        for name, shape in own.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    if differences:
        raise UserError(
            f"the checkpoint does not fit the model: {fmt.shortened(differences)}; "
            "build the model from the checkpoint's own config.json"
        )


def count_nonfinite(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Return how many numbers of each weight are NaN or infinite, of those that have some."""
    counts = {}
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            # torch has no isfinite for the 8-bit floats.
            counts[name] = int((~torch.isfinite(tensor if tensor.itemsize > 1 else tensor.float())).sum())
    return {name: count for name, count in counts.items() if count}


def refuse_nonfinite(counts: Mapping[str, int], on_warning: Callable[[str], None] | None = None) -> None:
    """Raise UserError if there are such weights, or hand the sentence to on_warning."""
    if counts:
        listing = fmt.shortened([f"{name} has {count}" for name, count in counts.items()])
        message = f"the checkpoint holds weights that are NaN or infinite: {listing}; go on from an earlier checkpoint"
        if on_warning is None:
            raise UserError(message)
        on_warning(message)


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


def _newest(run_dir: str | os.PathLike[str], use: Callable[[Path], T], on_skip: Callable[[str], None]) -> T | None:
    """Return what use makes of the newest checkpoint that it does not find damaged."""
    checkpoints = fmt.list_checkpoints(run_dir)
    for path in checkpoints:
        try:
            return use(path)
        except CheckpointDamaged as error:
            on_skip(f"skipped a checkpoint: {error}")
    if checkpoints:
        raise none_is_sound(run_dir, len(checkpoints))
    return None


def none_is_sound(run_dir: str | os.PathLike[str], number: int) -> UserError:
    """Return the error for a run all of whose checkpoints are damaged."""
    return UserError(
        f"none of the {number} checkpoints in {run_dir} can be read, each is damaged; "
        "choose another folder to start afresh"
    )


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


def _load_common(
    folder: Path, manifest: Manifest, verify: bool, device: torch.device | str, take: Take
) -> CheckpointState:
    config = _load_json(folder, fmt.CONFIG, manifest, verify)
    state = _load_json(folder, fmt.STATE, manifest, verify)
    if state.get("step") != manifest.step or not isinstance(state.get("meta"), dict):
        raise CheckpointDamaged(folder, fmt.STATE, f"is not the state of step {manifest.step}")
    tokenizer = None
    if fmt.TOKENIZER in manifest.files:
        tokenizer = _read_listed(folder, fmt.TOKENIZER, manifest, verify)
    return CheckpointState(
        step=manifest.step,
        weights=_load_tensors(folder, fmt.WEIGHTS, manifest, verify, device, take),
        meta={**state["meta"], "config": config},
        tokenizer=tokenizer,
        heldout_loss=manifest.heldout_loss,
        run=manifest.run,
        shapes={name: pieces[0][1].whole for name, pieces in manifest.pieces(fmt.WEIGHTS).items()},
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


def verify_files(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Compare every byte of these files, by default all, with the manifest. Errors as load_checkpoint."""
    for name in manifest.files if names is None else names:
        _verify_file(folder, name, manifest)


def _verify_file(folder: Path, name: str, manifest: Manifest) -> None:
    record = manifest.files[name]
    try:
        size = _size_of(folder, name)
        if size != record.size:
            raise CheckpointDamaged(folder, name, f"has {size} bytes, its manifest says {record.size}")
        if _hash_range(folder / name, 0, size) == record.xxh3_128:
            return
        if record.tensors is None:
            raise CheckpointDamaged(folder, name, "does not match its checksum")
        raise _locate_damage(folder, name, manifest)
    except OSError as error:
        raise CheckpointDamaged(folder, name, f"cannot be read: {error.strerror}") from error


def _locate_damage(folder: Path, name: str, manifest: Manifest) -> CheckpointDamaged:
    """Say which tensor, or the header, makes a tensor file differ from its checksum."""
    record = manifest.files[name]
    assert record.tensors is not None
    try:
        with open(folder / name, "rb") as file:
            entries = _checked_entries(file, name, manifest)
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


def _checked_entries(file: BinaryIO, name: str, manifest: Manifest) -> dict[str, Entry]:
    """Read the header of a tensor file. ValueError unless it is of the manifest's step and run, with its tensors."""
    record = manifest.files[name]
    assert record.tensors is not None
    entries, metadata = parse_header(file, record.size)
    expected = fmt.identity(manifest.step, manifest.run)
    if "step" in metadata and {key: metadata.get(key) for key in expected} != expected:
        said = f"step {metadata['step']} of run {metadata.get('run')}"
        raise ValueError(f"is of {said}, its manifest of step {manifest.step} of run {manifest.run}")
    if {name: (entry.dtype, entry.shape) for name, entry in entries.items()} != {
        name: (entry.dtype, entry.shape) for name, entry in record.tensors.items()
    }:
        raise ValueError("has a header with other names, dtypes or shapes than its manifest")
    return entries


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
    folder: Path, kind: str, manifest: Manifest, verify: bool, device: torch.device | str, take: Take
) -> dict[str, Tensor]:
    wanted: dict[str, _Wanted] = {}
    pieces_of = manifest.pieces(kind)
    for name, pieces in pieces_of.items():
        whole, dtype = pieces[0][1].whole, pieces[0][1].dtype
        if any((record.whole, record.dtype) != (whole, dtype) for _, record in pieces):
            raise CheckpointDamaged(folder, fmt.MANIFEST, "lists parts of different tensors under one name", name)
        if (box := take(kind, name, whole)) is not None:
            wanted[name] = _Wanted(*box)
    for file in manifest.files:
        if fmt.kind_of(file) == kind:
            for name, piece, record in _read_pieces(folder, file, manifest, verify, wanted):
                # The library maps the file: without a copy, a later change of the file would change the weights.
                wanted[name].add(piece, record, device)
    tensors = {}
    for name, want in wanted.items():
        if want.missing:
            raise CheckpointDamaged(folder, fmt.MANIFEST, f"lists parts that lack {want.missing} numbers", name)
        tensors[name] = want.result(DTYPES[pieces_of[name][0][1].dtype], device)
    return tensors


class _Wanted:
    """A part of a tensor that is put together from the pieces that files hold."""

    def __init__(self, start: tuple[int, ...], shape: tuple[int, ...]) -> None:
        self.start, self.shape = start, shape
        self.missing = math.prod(shape)
        self._tensor: Tensor | None = None

    def overlap(self, record: TensorRecord) -> tuple[list[int], list[int]] | None:
        """Return where the piece and this part have numbers in common, from (of the whole) to, None if nowhere."""
        first = [max(a, b) for a, b in zip(self.start, record.start, strict=True)]
        last = [
            min(a + n, b + m) for a, n, b, m in zip(self.start, self.shape, record.start, record.shape, strict=True)
        ]
        return (first, last) if all(a < b for a, b in zip(first, last, strict=True)) else None

    def add(self, piece: Tensor, record: TensorRecord, device: torch.device | str) -> None:
        box = self.overlap(record)
        assert box is not None
        if (record.start, record.shape) == (self.start, self.shape):  # the usual case: one piece is all
            self._tensor = piece.clone().to(device)
        else:
            if self._tensor is None:
                self._tensor = torch.empty(self.shape, dtype=piece.dtype, device=device)
            _box(self._tensor, self.start, *box).copy_(_box(piece, record.start, *box))
        self.missing -= math.prod(b - a for a, b in zip(*box, strict=True))

    def result(self, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        return torch.empty(self.shape, dtype=dtype, device=device) if self._tensor is None else self._tensor


def _box(tensor: Tensor, start: Sequence[int], first: Sequence[int], last: Sequence[int]) -> Tensor:
    """View of a tensor that begins at start of a whole, the part of it from first to last of the whole."""
    return tensor[tuple(slice(a - s, b - s) for s, a, b in zip(start, first, last, strict=True))]


def _read_pieces(
    folder: Path, file_name: str, manifest: Manifest, verify: bool, wanted: Mapping[str, _Wanted]
) -> Iterator[tuple[str, Tensor, TensorRecord]]:
    """Yield the tensors of a file in which wanted numbers lie, views of the file."""
    file_record = manifest.files[file_name]
    assert file_record.tensors is not None
    needed = {
        name: record
        for name, record in file_record.tensors.items()
        if name in wanted and wanted[name].overlap(record) is not None
    }
    if file_record.tensors and not needed:
        return
    try:
        if (size := _size_of(folder, file_name)) != file_record.size:
            raise CheckpointDamaged(folder, file_name, f"has {size} bytes, its manifest says {file_record.size}")
        with open(folder / file_name, "rb") as file:
            _checked_entries(file, file_name, manifest)
        with safe_open(folder / file_name, framework="pt") as library:
            for name, record in needed.items():
                tensor = library.get_tensor(name)
                if (DTYPE_CODES[tensor.dtype], tuple(tensor.shape)) != (record.dtype, record.shape):
                    raise CheckpointDamaged(folder, file_name, "was read with another dtype or shape", name)
                if verify and fmt.xxh3_128(tensor_bytes(tensor)) != record.xxh3_128:
                    raise CheckpointDamaged(folder, file_name, "does not match its checksum", name)
                yield name, tensor, record
    except OSError as error:
        raise CheckpointDamaged(folder, file_name, f"cannot be read: {error.strerror}") from error
    except (ValueError, SafetensorError) as error:
        raise CheckpointDamaged(folder, file_name, str(error)) from error
