"""save_checkpoint: write a checkpoint aside, fsync it, and only then give it its name.

The commit protocol: files are written and fsynced one by one in a temporary folder, the folder is fsynced, renamed to
its final name, and the run folder is fsynced. A kill or a power loss at any instant leaves the old checkpoints, or
these and the new one; nothing incomplete ever has a final name.

The safetensors library's own writer is not used: it neither fsyncs nor returns checksums, and a checkpoint must not
hold a second copy of the weights in memory. Here each tensor is hashed by a thread while it is written.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash
from torch import Tensor

from warploom.checkpoint import format as fmt
from warploom.checkpoint.format import CheckpointState, FileRecord, Manifest, TensorRecord
from warploom.checkpoint.tensors import DTYPE_CODES, build_header, tensor_bytes
from warploom.errors import UserError

# Both checksums read a piece while it is in the processor's cache; the copy into the page cache has the same pieces.
_PIECE_BYTES = 1 << 18

# Checkpoints that this process wrote and fsynced, or verified, with their files' times then: retention, which runs
# after each save, need not read them again.
_sound: dict[Path, tuple[tuple[str, int, int, int], ...]] = {}


class SaveFailed(UserError):
    """A checkpoint that could not be written, or an old one not deleted. The others are untouched; a run may go on."""


def save_checkpoint(run_dir: str | os.PathLike[str], state: CheckpointState) -> Path:
    """Write state to run_dir/step-<step>/ and return that folder once it is on the disk.

    A checkpoint of the same step is replaced, at no instant leaving neither. Left-overs of dead saves are swept first.
    Raises SaveFailed, which names the path, the bytes needed and the bytes free, when the file system refuses (full,
    read-only, I/O error; the last is retried once from the start). TypeError for tensors or meta that no file can hold.
    """
    run_dir = Path(run_dir)
    try:
        try:
            return _save(run_dir, state)
        except OSError as error:
            # After a failed fsync the kernel forgets which pages were not written, so only a whole new attempt counts.
            if error.errno != errno.EIO:
                raise
            return _save(run_dir, state)
    except OSError as error:
        raise SaveFailed(explain(run_dir, state, error)) from error


def sweep(run_dir: str | os.PathLike[str]) -> None:
    """Remove what dead saves and deletions left in a run folder. Temporary folders of living processes stay."""
    with os.scandir(run_dir) as entries:
        names = [entry.name for entry in entries]
    for name in names:
        path = Path(run_dir, name)
        temporary = fmt.TEMPORARY_NAME.fullmatch(name)
        if name.startswith(fmt.TRASH_PREFIX) or (temporary and not _writes_elsewhere(int(temporary[1]))):
            shutil.rmtree(path, ignore_errors=True)
        elif name.startswith(fmt.REPLACED_PREFIX) and fmt.step_of(name) is not None:
            _settle_replaced(path)


def make_run_folder(run_dir: Path) -> None:
    """Create run_dir and its missing parents, so that a power loss cannot take them from under a checkpoint."""
    missing = []
    while not os.path.isdir(run_dir):
        missing.append(run_dir)
        run_dir = run_dir.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint folder. It loses its name first, so that a kill leaves it whole or not counted at all."""
    trash = checkpoint.with_name(f"{fmt.TRASH_PREFIX}{checkpoint.name.lstrip('.')}-{os.getpid()}")
    shutil.rmtree(trash, ignore_errors=True)
    _rename(checkpoint, trash)
    fsync_folder(checkpoint.parent)
    shutil.rmtree(trash, ignore_errors=True)  # what stays is swept by the next save


def remember(checkpoint: Path) -> None:
    """Note that a checkpoint is sound as it is now."""
    _sound[checkpoint.absolute()] = _file_times(checkpoint)


def is_remembered(checkpoint: Path) -> bool:
    """Whether a checkpoint was sound when this process last wrote or verified it, and no file has changed since."""
    return _sound.get(checkpoint.absolute()) == _file_times(checkpoint)


def _save(run_dir: Path, state: CheckpointState) -> Path:
    make_run_folder(run_dir)
    sweep(run_dir)
    final = run_dir / fmt.folder_name(state.step)
    temporary = run_dir / f".tmp-{final.name}-{os.getpid()}"
    try:
        temporary.mkdir()
        _write_files(temporary, state)
        fsync_folder(temporary)
        commit(temporary, final)
    except BaseException:
        undo(temporary, final)
        raise
    remember(final)
    return final


def commit(temporary: Path, final: Path) -> None:
    """Give a folder whose files are on the disk its final name."""
    replaced = _replaced(final)
    if final.exists():
        # A folder cannot be renamed over another. Between these two renames the old one counts under its second name.
        _rename(final, replaced)
    _rename(temporary, final)
    fsync_folder(final.parent)
    if replaced.exists():
        discard(replaced)


def undo(temporary: Path, final: Path) -> None:
    """Leave the run folder as it was before a save that failed."""
    shutil.rmtree(temporary, ignore_errors=True)
    replaced = _replaced(final)
    if replaced.exists() and not final.exists():
        _rename(replaced, final)


def _replaced(final: Path) -> Path:
    return final.with_name(fmt.REPLACED_PREFIX + final.name)


def _settle_replaced(replaced: Path) -> None:
    """Finish or undo, after a kill, the replacement of a checkpoint by one of the same step."""
    final = replaced.with_name(replaced.name.removeprefix(fmt.REPLACED_PREFIX))
    if final.exists():
        discard(replaced)
    else:
        _rename(replaced, final)
        fsync_folder(final.parent)


def _writes_elsewhere(pid: int) -> bool:
    """Whether another living process has this id. What bears our own id is left from a failed save or an older boot."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _write_files(folder: Path, state: CheckpointState) -> None:
    files = write_tensor_files(folder, state)
    write_manifest(folder, state, files | write_common_files(folder, state))


def write_tensor_files(folder: Path, state: CheckpointState, rank: int | None = None) -> dict[str, FileRecord]:
    """Write and fsync the tensors of a state, under the names of process rank's own files if there are several."""
    files = {}
    for kind, tensors in ((fmt.WEIGHTS, state.weights), (fmt.OPTIMIZER, state.optimizer), (fmt.RNG, state.rng)):
        name = kind if rank is None else fmt.file_of_rank(kind, rank)
        files[name] = _write_tensors(folder / name, tensors, state)
    return files


def write_common_files(folder: Path, state: CheckpointState) -> dict[str, FileRecord]:
    """Write and fsync what a checkpoint has once, however many processes write it, but for the manifest."""
    meta = dict(state.meta)
    config = meta.pop("config", {})
    files = {
        fmt.CONFIG: _write_bytes(folder / fmt.CONFIG, fmt.encode_json(config)),
        fmt.STATE: _write_bytes(folder / fmt.STATE, fmt.encode_json({"step": state.step, "meta": meta})),
    }
    if state.tokenizer is not None:
        files[fmt.TOKENIZER] = _write_bytes(folder / fmt.TOKENIZER, state.tokenizer)
    return files


def write_manifest(folder: Path, state: CheckpointState, files: dict[str, FileRecord]) -> None:
    """Write and fsync the manifest of these files, and its checksum."""
    loss = state.heldout_loss
    loss = float(loss) if loss is not None and math.isfinite(loss) else None
    manifest = fmt.encode_manifest(Manifest(state.step, loss, files, state.run))
    _write_file(folder / fmt.MANIFEST, [manifest])
    _write_file(folder / fmt.MANIFEST_DIGEST, [fmt.manifest_digest_line(manifest)])


def _write_tensors(path: Path, tensors: dict[str, Tensor], state: CheckpointState) -> FileRecord:
    header, order = build_header(tensors, fmt.identity(state.step, state.run))
    records: dict[str, TensorRecord] = {}
    file_digest = xxhash.xxh3_128(header)

    # Hashing and writing both leave the interpreter to others, so the checksums take a core beside the one that copies
    # the bytes to the system, and next to none of the save's time.
    with ThreadPoolExecutor(1, "checksums") as thread:

        def pieces() -> Iterator[bytes | memoryview]:
            yield header
            for name in order:
                tensor = tensors[name]
                data = tensor_bytes(tensor)
                digest = thread.submit(_digest, data, file_digest)
                for start in range(0, len(data), _PIECE_BYTES):
                    yield data[start : start + _PIECE_BYTES]
                records[name] = TensorRecord(
                    DTYPE_CODES[tensor.dtype], tuple(tensor.shape), digest.result(), state.places.get(name)
                )

        size = _write_file(path, pieces())
    return FileRecord(size, file_digest.hexdigest(), records)


def _digest(data: memoryview, file_digest: xxhash.xxh3_128) -> str:
    """Return the checksum of a tensor, whose bytes are added to that of its file as well."""
    digest = xxhash.xxh3_128()
    for start in range(0, len(data), _PIECE_BYTES):
        piece = data[start : start + _PIECE_BYTES]
        digest.update(piece)
        file_digest.update(piece)
    return digest.hexdigest()


def _write_bytes(path: Path, data: bytes) -> FileRecord:
    return FileRecord(_write_file(path, [data]), fmt.xxh3_128(data))


def _write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> int:
    """Write and fsync a new file, and return its size."""
    size = 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for piece in pieces:
            rest = memoryview(piece)
            size += len(rest)
            while rest:
                rest = rest[_write(fd, rest) :]
        _fsync(fd)
    finally:
        os.close(fd)
    return size


def fsync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _fsync(fd)
    finally:
        os.close(fd)


def _file_times(checkpoint: Path) -> tuple[tuple[str, int, int, int], ...]:
    with os.scandir(checkpoint) as entries:
        stats = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    return tuple(sorted((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats))


def explain(run_dir: Path, state: CheckpointState, error: OSError) -> str:
    """Say in a sentence why a save failed, what it needs and what is kept."""
    tensors = (*state.weights.values(), *state.optimizer.values(), *state.rng.values())
    needed = sum(tensor.nbytes for tensor in tensors) + len(state.tokenizer or b"")
    existing = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if os.path.isdir(folder))
    kept = fmt.list_checkpoints(run_dir)
    return (
        f"the checkpoint of step {state.step} could not be saved in {run_dir}: {error.strerror or error} "
        f"({errno.errorcode.get(error.errno or 0, 'no errno')}), it needs {needed:,} bytes and "
        f"{shutil.disk_usage(existing).free:,} are free; "
        f"{f'{kept[0].name} is kept' if kept else 'there is no earlier checkpoint'}; "
        "make room or choose another folder"
    )


# The three system calls by which a checkpoint reaches the disk, so that tests can make each of them fail.
_write = os.write
_fsync = os.fsync
_rename = os.rename
