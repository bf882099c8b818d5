"""The checkpoint format, version 1, and the types that stand for it. What is written here is enough to write a reader.

A run folder holds one folder per checkpoint, `step-` and the step as at least eight digits, and may hold these:

    .lock                       held by the running trainer (lock.py)
    .tmp-step-00000042-<pid>    a checkpoint being written by that process, or left by it when it died: never read
    .replaced-step-00000042     a complete checkpoint while a new one of the same step takes its name; it counts only
                                as long as step-00000042 does not exist
    .trash-...                  being deleted: never read

A checkpoint folder is complete as soon as it has its name. It holds regular files only:

    model.safetensors       the weights, by the model's state_dict names
    optimizer.safetensors   optimizer state, "<prefix><parameter name>/<state key>" (optimizer.py)
    rng.safetensors         random states that are tensors (rng.py)
    config.json             the whole resolved configuration of the run, the model's included
    state.json              {"step": int, "meta": object}: schedule, loader position, counters, optimizer scalars, the
                            random states that are not tensors, the environment; whatever the trainer put there
    tokenizer.json          the tokenizer as its library wrote it; absent if the run has none
    manifest.json           see below
    manifest.json.xxh3      "<xxh3_128 of manifest.json>  manifest.json" and a newline, as `xxhsum -H2` writes it

A .safetensors file is a little-endian uint64 n, n bytes of UTF-8 JSON {name: {"dtype", "shape", "data_offsets"}}, then
the tensors' bytes, row-major and little-endian, without gaps (https://github.com/huggingface/safetensors). JSON is
UTF-8 with no key twice in an object; numbers are as Python's json writes them: floats in the shortest form that reads
back to the same float64, and in state.json possibly NaN or Infinity.

manifest.json:

    {"format": "warploom checkpoint", "version": 1, "step": 42, "heldout_loss": 1.25 or null,
     "files": {"model.safetensors": {"size": bytes, "xxh3_128": hex,
                                     "tensors": {name: {"dtype": "F32", "shape": [2, 3], "xxh3_128": hex}}},
               "state.json": {"size": bytes, "xxh3_128": hex}, ...}}

It lists every other file. File names are plain names, without any folder. xxh3_128 is XXH3 with 128 bits and seed 0 as
32 lower-case hex digits, big-endian ("canonical"), of the whole file, or of one tensor's bytes. It guards against
accidents, not against an adversary. Every later version keeps manifest.json, manifest.json.xxh3, "format" and
"version", so any reader can tell a newer checkpoint from a damaged one.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import xxhash
from torch import Tensor

from warploom.errors import UserError

FORMAT = "warploom checkpoint"
FORMAT_VERSION = 1

WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
RNG = "rng.safetensors"
CONFIG = "config.json"
STATE = "state.json"
TOKENIZER = "tokenizer.json"
MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.json.xxh3"

TEMPORARY_NAME = re.compile(r"\.tmp-step-\d+-(\d+)")
TRASH_PREFIX = ".trash-"
REPLACED_PREFIX = ".replaced-"
_MAX_SHOWN = 8
_STEP_NAME = re.compile(r"step-(\d{8,18})")


@dataclass
class CheckpointState:
    """Everything a run needs to go on, and a sampler needs to sample.

    meta is a JSON object (tuples come back as lists); its entry "config" becomes config.json, the rest state.json.
    heldout_loss, in nats per token, is what keep-best retention ranks by; a non-finite one counts as none.
    """

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    rng: dict[str, Tensor] = field(default_factory=dict)
    tokenizer: bytes | None = None
    heldout_loss: float | None = None


class CheckpointDamaged(UserError):
    """A checkpoint that does not hold what was written. `file` and, where it is one tensor, `tensor` say where."""

    def __init__(self, folder: Path, file: str, reason: str, tensor: str | None = None) -> None:
        where = f"{file}: tensor {tensor!r}" if tensor is not None else file
        super().__init__(f"checkpoint {folder} is damaged: {where} {reason}; go on from another checkpoint of the run")
        self.folder, self.file, self.tensor = folder, file, tensor


class CheckpointTooNew(UserError):
    """A sound checkpoint of a format version that this code does not know."""


@dataclass(frozen=True)
class TensorRecord:
    dtype: str  # the safetensors code: "F32", "BF16"
    shape: tuple[int, ...]
    xxh3_128: str


@dataclass(frozen=True)
class FileRecord:
    size: int
    xxh3_128: str
    tensors: dict[str, TensorRecord] | None = None


@dataclass(frozen=True)
class Manifest:
    step: int
    heldout_loss: float | None
    files: dict[str, FileRecord]


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """Return the step that a checkpoint folder's name states, None for any other name."""
    match = _STEP_NAME.fullmatch(name.removeprefix(REPLACED_PREFIX))
    if match is None or folder_name(int(match[1])) != match[0]:
        return None
    return int(match[1])


def list_checkpoints(run_dir: str | os.PathLike[str]) -> list[Path]:
    """List the committed checkpoints of a run, newest first by step; their content is not looked at.

    A missing run folder has none. Times are ignored: a copied run or a clock set back does not change the order.
    """
    try:
        with os.scandir(run_dir) as entries:
            names = {entry.name for entry in entries if entry.is_dir(follow_symlinks=False)}
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"the run folder {run_dir} cannot be read: {error.strerror}; choose another folder") from error
    steps = {}
    for name in names:
        step = step_of(name)
        if step is not None and not (name.startswith(REPLACED_PREFIX) and folder_name(step) in names):
            steps[name] = step
    return [Path(run_dir) / name for name in sorted(steps, key=lambda name: steps[name], reverse=True)]


def xxh3_128(data: bytes | memoryview) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def encode_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def parse_json(data: bytes) -> Any:
    """Parse UTF-8 JSON from an untrusted file. ValueError for anything malformed, a repeated key or deep nesting."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_object_without_repeats)
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return result


def encode_manifest(manifest: Manifest) -> bytes:
    files: dict[str, Any] = {}
    for name, record in manifest.files.items():
        files[name] = {"size": record.size, "xxh3_128": record.xxh3_128}
        if record.tensors is not None:
            files[name]["tensors"] = {
                tensor: {"dtype": entry.dtype, "shape": entry.shape, "xxh3_128": entry.xxh3_128}
                for tensor, entry in record.tensors.items()
            }
    header = {"format": FORMAT, "version": FORMAT_VERSION, "step": manifest.step, "heldout_loss": manifest.heldout_loss}
    return encode_json({**header, "files": files})


def manifest_digest_line(manifest: bytes) -> bytes:
    return f"{xxh3_128(manifest)}  {MANIFEST}\n".encode()


def parse_manifest(data: bytes) -> Manifest:
    """Parse manifest.json. Raises ValueError with the reason, CheckpointTooNew for a version not known here."""
    raw = parse_json(data)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ValueError(f'does not say "format": "{FORMAT}"')
    version = raw.get("version")
    if not is_count(version):
        raise ValueError(f"has the version {version!r}")
    if version > FORMAT_VERSION:
        raise CheckpointTooNew(
            f"it has format version {version}, and this warploom reads up to version {FORMAT_VERSION}; "
            f"use a warploom that reads version {version}"
        )
    step, loss, files = raw.get("step"), raw.get("heldout_loss"), raw.get("files")
    if not is_count(step):
        raise ValueError(f"has the step {step!r}")
    if loss is not None and not (isinstance(loss, float) and math.isfinite(loss)):
        raise ValueError(f"has the heldout_loss {loss!r}")
    if not isinstance(files, dict):
        raise ValueError("lists no files")
    records = {name: _file_record(name, record) for name, record in files.items()}
    for required in (WEIGHTS, OPTIMIZER, RNG):
        if required not in records or records[required].tensors is None:
            raise ValueError(f"does not list {required} with its tensors")
    for required in (CONFIG, STATE):
        if required not in records:
            raise ValueError(f"does not list {required}")
    return Manifest(step, loss, records)


def _file_record(name: str, raw: Any) -> FileRecord:
    # The name is joined to the folder's path, so it must not lead out of it.
    if name in ("", ".", "..") or any(char in name for char in "/\\\0"):
        raise ValueError(f"lists {name!r}, which is not a plain file name and could lead out of the folder")
    if not isinstance(raw, dict) or not is_count(raw.get("size")) or not isinstance(raw.get("xxh3_128"), str):
        raise ValueError(f"lists {name!r} without its size and xxh3_128")
    tensors = raw.get("tensors")
    if tensors is None:
        return FileRecord(raw["size"], raw["xxh3_128"])
    if not isinstance(tensors, dict):
        raise ValueError(f"lists {name!r} with tensors that are not an object")
    return FileRecord(
        raw["size"], raw["xxh3_128"], {tensor: _tensor_record(name, tensor, raw) for tensor, raw in tensors.items()}
    )


def _tensor_record(file: str, name: str, raw: Any) -> TensorRecord:
    if (
        not isinstance(raw, dict)
        or not isinstance(raw.get("dtype"), str)
        or not isinstance(raw.get("shape"), list)
        or not all(map(is_count, raw["shape"]))
        or not isinstance(raw.get("xxh3_128"), str)
    ):
        raise ValueError(f"lists tensor {name!r} of {file} without its dtype, shape and xxh3_128")
    return TensorRecord(raw["dtype"], tuple(raw["shape"]), raw["xxh3_128"])


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a parsed JSON value is a non-negative integer (True and False are not)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def shortened(items: list[str]) -> str:
    """Join the items for a message, a long list cut short."""
    more = len(items) - _MAX_SHOWN
    return ", ".join(items[:_MAX_SHOWN]) + (f" and {more} more" if more > 0 else "")
