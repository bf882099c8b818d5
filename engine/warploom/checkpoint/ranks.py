"""Checkpoints of a run of many processes: each writes its own files and reads what it needs; all commit, or none.

The commit has two phases. Process 0 opens a temporary folder. Every process writes its files there, fsyncs them and the
folder, and reports their checksums. Only when all reports are in does process 0 write the manifest, which lists these
very files, and rename the folder. So a process that dies or fails at any point leaves the old checkpoint as it is, and
a checkpoint of two steps cannot come about: reports of another step are refused, and a file that is not the one that
was reported does not have its checksum.

The run folder must be one that all processes see.
"""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from warploom.checkpoint import format as fmt
from warploom.checkpoint.format import CheckpointDamaged, CheckpointState, FileRecord
from warploom.checkpoint.load import Take, checkpoints_at, load_part, none_is_sound, read_manifest, verify_files
from warploom.checkpoint.save import (
    SaveFailed,
    commit,
    explain,
    fsync_folder,
    make_run_folder,
    remember,
    sweep,
    undo,
    write_common_files,
    write_manifest,
    write_tensor_files,
)
from warploom.errors import UserError


class Ranks(Protocol):
    """The processes of a run, as their checkpoints need them (parallel.state.Ranks)."""

    rank: int
    size: int

    def exchange(self, value: Any) -> list[Any]:
        """Return what each process gives, by rank: JSON values. Every process must call."""

    def own_meta(self, meta: dict[str, Any]) -> dict[str, Any]:
        """Return the part of a state's meta that only this process knows."""

    def whole_meta(self, meta: dict[str, Any], own: list[dict[str, Any]]) -> dict[str, Any]:
        """Return process 0's meta with what the processes know together."""


def _nothing() -> None:
    pass


def save_over_ranks(
    run_dir: str | os.PathLike[str], state: CheckpointState, ranks: Ranks, then: Callable[[], object] = _nothing
) -> Path:
    """Write the states of all processes to run_dir/step-<step>/, and return that folder once it is on the disk.

    state: this process's tensors, each number of the run on one process alone; its meta counts on process 0, but for
    what ranks.own_meta takes of it. then: what process 0 does after the commit. Every process must call. Otherwise as
    save_checkpoint, except that SaveFailed comes on every process, and names the one that failed.
    """
    run_dir = Path(run_dir)
    try:
        final = _save(run_dir, state, ranks)
    except _InputOutputError:
        final = _save(run_dir, state, ranks)  # as save_checkpoint: only a whole new attempt counts

    def finish() -> None:
        if ranks.rank == 0:
            then()

    _together(finish, str, ranks)
    return final


class _InputOutputError(SaveFailed):
    """Some process met EIO."""


def _save(run_dir: Path, state: CheckpointState, ranks: Ranks) -> Path:
    final = run_dir / fmt.folder_name(state.step)
    temporary = run_dir / f".tmp-{final.name}-{os.getpid()}"
    is_first = ranks.rank == 0

    def together(work: Callable[[], Any]) -> list[Any]:
        return _together(work, lambda error: explain(run_dir, state, error), ranks)

    def begin() -> str:
        make_run_folder(run_dir)
        sweep(run_dir)
        temporary.mkdir()
        return temporary.name

    def write() -> dict[str, Any]:
        files = write_tensor_files(folder, state, ranks.rank)
        fsync_folder(folder)
        own = ranks.own_meta(state.meta)
        return {"step": state.step, "run": state.run, "files": fmt.encode_files(files), "meta": own}

    def finish() -> None:
        files = _checked_files(folder, state, reports)
        whole = dataclasses.replace(state, meta=ranks.whole_meta(state.meta, [report["meta"] for report in reports]))
        write_manifest(folder, whole, files | write_common_files(folder, whole))
        fsync_folder(folder)
        commit(folder, final)
        remember(final)

    try:
        folder = run_dir / together(begin if is_first else _nothing)[0]
        reports = together(write)
        together(finish if is_first else _nothing)
    except BaseException:
        if is_first:
            undo(temporary, final)
        raise
    return final


def _together(work: Callable[[], Any], say: Callable[[OSError], str], ranks: Ranks) -> list[Any]:
    """Do each process's work and return all results, or raise on every process what went wrong on the first."""
    done: dict[str, Any] = {"value": None, "code": 0, "reason": ""}
    try:
        done["value"] = work()
    except OSError as error:
        done |= {"code": error.errno or -1, "reason": say(error)}
    except Exception as error:
        # The others wait for this process's word, whatever happened to it.
        ranks.exchange(done | {"reason": str(error) if isinstance(error, UserError) else repr(error)})
        raise
    said = ranks.exchange(done)
    wrong = [rank for rank, one in enumerate(said) if one["reason"]]
    if wrong:
        kind = _InputOutputError if any(one["code"] == errno.EIO for one in said) else SaveFailed
        raise kind(f"process {wrong[0]} of {ranks.size}: {said[wrong[0]]['reason']}")
    return [one["value"] for one in said]


def _checked_files(folder: Path, state: CheckpointState, reports: list[dict[str, Any]]) -> dict[str, FileRecord]:
    """Return the files of all processes. SaveFailed unless they are of one step and run, and to be seen from here."""
    files: dict[str, FileRecord] = {}
    for rank, report in enumerate(reports):
        if (report["step"], report["run"]) != (state.step, state.run):
            raise SaveFailed(
                f"process {rank} saved step {report['step']} of run {report['run']} and process 0 step {state.step} of "
                f"run {state.run}; nothing was committed, the processes are not in step"
            )
        files |= fmt.decode_files(report["files"])
    for name, record in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != record.size:
            raise SaveFailed(
                f"{path} was written by another process and is not to be seen, whole, by process 0; "
                "put the run folder on a file system that all processes share"
            )
    return files


def load_over_ranks(
    path: str | os.PathLike[str],
    take: Take,
    ranks: Ranks,
    *,
    device: torch.device | str = "cpu",
    on_skip: Callable[[str], None],
) -> tuple[Path, CheckpointState] | None:
    """Load a checkpoint, or the newest of a run that verifies, on every process what take wants; None if there is none.

    The processes share out the verifying of every byte, and take the same checkpoint: one that a single process finds
    damaged is passed over by all, each saying so to on_skip. Every process must call. Errors as load_latest.
    """
    names = ranks.exchange(_candidates(Path(path)) if ranks.rank == 0 else None)[0]
    if "error" in names:
        raise UserError(names["error"])
    for name in names["paths"]:
        folder = Path(name)
        state, verdict = _attempt(folder, take, ranks, device)
        said = [one for one in ranks.exchange(verdict) if one is not None]
        if not said:
            assert state is not None
            return folder, state
        fatal = next((one for one in said if not one["is_damage"]), said[0] if names["is_named"] else None)
        if fatal is not None:
            raise UserError(fatal["reason"])
        on_skip(f"skipped a checkpoint: {said[0]['reason']}")
    if names["paths"]:
        raise none_is_sound(path, len(names["paths"]))
    return None


def _candidates(path: Path) -> dict[str, Any]:
    try:
        is_named = (path / fmt.MANIFEST).exists() or fmt.step_of(path.name) is not None
        paths = checkpoints_at(path) if is_named else fmt.list_checkpoints(path)
    except UserError as error:
        return {"error": str(error)}
    return {"paths": [str(each) for each in paths], "is_named": is_named}


def _attempt(
    folder: Path, take: Take, ranks: Ranks, device: torch.device | str
) -> tuple[CheckpointState | None, dict[str, Any] | None]:
    """Verify this process's share of the files and load its part; or say what is wrong."""
    try:
        manifest = read_manifest(folder)
        verify_files(folder, manifest, sorted(manifest.files)[ranks.rank :: ranks.size])
        return load_part(folder, manifest, take, device=device), None
    except UserError as error:
        return None, {"reason": str(error), "is_damage": isinstance(error, CheckpointDamaged)}
