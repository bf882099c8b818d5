"""The checkpoint format and the types that stand for it. What is written here is enough to write a reader.

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

Several processes write one file each of the three kinds that hold tensors, model.rank00003.safetensors for process 3:
the parts of the tensors that it is the owner of, and its random states, named "rank3/...". Together the parts of a
tensor are the tensor, each number once. Such a checkpoint has version 2, one of whole tensors version 1.

A .safetensors file is a little-endian uint64 n, n bytes of UTF-8 JSON {name: {"dtype", "shape", "data_offsets"}}, then
the tensors' bytes, row-major and little-endian, without gaps (https://github.com/huggingface/safetensors). JSON is
UTF-8 with no key twice in an object; numbers are as Python's json writes them: floats in the shortest form that reads
back to the same float64, and in state.json possibly NaN or Infinity.

The header's "__metadata__" says {"step": "42", "run": "<id of the run>"}, so that a file of another step or run is
known as such; it may be absent.

manifest.json:

    {"format": "warploom checkpoint", "version": 1, "step": 42, "run": id or null, "heldout_loss": 1.25 or null,
     "files": {"model.safetensors": {"size": bytes, "xxh3_128": hex,
                                     "tensors": {name: {"dtype": "F32", "shape": [2, 3], "xxh3_128": hex}}},
               "state.json": {"size": bytes, "xxh3_128": hex}, ...}}

A part of a tensor has in addition "whole": [6, 3], the shape of the tensor, and "start": [2, 0], where the part begins
in it. "run" may be absent. The manifest lists every other file. File names are plain names, without any folder.
xxh3_128 is XXH3 with 128 bits and seed 0 as 32 lower-case hex digits, big-endian ("canonical"), of the whole file, or
of one tensor's bytes. It guards against accidents, not against an adversary. Every later version keeps manifest.json,
manifest.json.xxh3, "format" and "version", so any reader can tell a newer checkpoint from a damaged one.
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
FORMAT_VERSION = 2

WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
RNG = "rng.safetensors"
CONFIG = "config.json"
STATE = "state.json"
TOKENIZER = "tokenizer.json"
MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.json.xxh3"

# The kinds of files that hold tensors, by their name where one process wrote them.
TENSOR_KINDS = (WEIGHTS, OPTIMIZER, RNG)
_RANK_NAME = re.compile(r"(\w+)\.rank\d{5,}\.safetensors")

TEMPORARY_NAME = re.compile(r"\.tmp-step-\d+-(\d+)")
TRASH_PREFIX = ".trash-"
REPLACED_PREFIX = ".replaced-"
_MAX_SHOWN = 8
_STEP_NAME = re.compile(r"step-(\d{8,18})")


@dataclass(frozen=True)
class Place:
    """Where a part of a tensor belongs: the shape of the whole tensor, and where in it the part begins."""

    whole: tuple[int, ...]
    start: tuple[int, ...]


@dataclass
class CheckpointState:
    """Everything a run needs to go on, and a sampler needs to sample.

    meta is a JSON object (tuples come back as lists); its entry "config" becomes config.json, the rest state.json.
    heldout_loss, in nats per token, is what keep-best retention ranks by; a non-finite one counts as none. run names
    the run. places: of the weights and optimizer tensors that are parts, by name, of which tensor and where in it.
    shapes: of all weights, whole, whatever part of them is here; set by loading.
    """

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    rng: dict[str, Tensor] = field(default_factory=dict)
    tokenizer: bytes | None = None
    heldout_loss: float | None = None
    run: str | None = None
    places: dict[str, Place] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


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
    place: Place | None = None
    """None for a whole tensor."""

    @property
    def whole(self) -> tuple[int, ...]:
        return self.shape if self.place is None else self.place.whole

    @property
    def start(self) -> tuple[int, ...]:
        return (0,) * len(self.shape) if self.place is None else self.place.start


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
    run: str | None = None

    @property
    def version(self) -> int:
        """The oldest version whose readers know everything in here."""
        return 1 if all(name in self.files for name in TENSOR_KINDS) else 2

    def pieces(self, kind: str) -> dict[str, list[tuple[str, TensorRecord]]]:
        """Return the tensors of a kind by name: the files that hold parts of each, or the whole, with their records."""
        found: dict[str, list[tuple[str, TensorRecord]]] = {}
        for file, record in self.files.items():
            if kind_of(file) == kind:
                for name, entry in (record.tensors or {}).items():
                    found.setdefault(name, []).append((file, entry))
        return found

    def checksum(self, kind: str) -> str:
        """Return a checksum of all tensors of a kind: the file's own where it is one file."""
        digests = [self.files[name].xxh3_128 for name in sorted(self.files) if kind_of(name) == kind]
        return digests[0] if len(digests) == 1 else xxh3_128("".join(digests).encode())


def file_of_rank(kind: str, rank: int) -> str:
    """Return the name of a process's own file of a kind."""
    return f"{kind.removesuffix('.safetensors')}.rank{rank:05d}.safetensors"


def kind_of(file: str) -> str | None:
    """Return which of TENSOR_KINDS a file is of, None for other files."""
    match = _RANK_NAME.fullmatch(file)
    kind = file if match is None else f"{match[1]}.safetensors"
    return kind if kind in TENSOR_KINDS else None


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


def identity(step: int, run: str | None) -> dict[str, str]:
    """Return what the header of a checkpoint's tensor file says of where it belongs."""
    return {"step": str(step), **({} if run is None else {"run": run})}


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


def encode_files(records: dict[str, FileRecord]) -> dict[str, Any]:
    """Return file records as JSON values, as the manifest has them."""
    files: dict[str, Any] = {}
    for name, record in records.items():
        files[name] = {"size": record.size, "xxh3_128": record.xxh3_128}
        if record.tensors is not None:
            files[name]["tensors"] = {tensor: _tensor_entry(entry) for tensor, entry in record.tensors.items()}
    return files


def decode_files(files: dict[str, Any]) -> dict[str, FileRecord]:
    """Read what encode_files gave. Raises ValueError with the reason."""
    return {name: _file_record(name, record) for name, record in files.items()}


def encode_manifest(manifest: Manifest) -> bytes:
    header = {"format": FORMAT, "version": manifest.version, "step": manifest.step, "run": manifest.run}
    return encode_json({**header, "heldout_loss": manifest.heldout_loss, "files": encode_files(manifest.files)})


def _tensor_entry(record: TensorRecord) -> dict[str, Any]:
    entry = {"dtype": record.dtype, "shape": record.shape, "xxh3_128": record.xxh3_128}
    return entry if record.place is None else {**entry, "whole": record.place.whole, "start": record.place.start}


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
    step, run, loss, files = raw.get("step"), raw.get("run"), raw.get("heldout_loss"), raw.get("files")
    if not is_count(step):
        raise ValueError(f"has the step {step!r}")
    if run is not None and not isinstance(run, str):
        raise ValueError(f"has the run {run!r}")
    if loss is not None and not (isinstance(loss, float) and math.isfinite(loss)):
        raise ValueError(f"has the heldout_loss {loss!r}")
    if not isinstance(files, dict):
        raise ValueError("lists no files")
    records = decode_files(files)
    for required in TENSOR_KINDS:
        found = [record for name, record in records.items() if kind_of(name) == required]
        if not found or any(record.tensors is None for record in found):
            raise ValueError(f"does not list {required} with its tensors")
    for required in (CONFIG, STATE):
        if required not in records:
            raise ValueError(f"does not list {required}")
    return Manifest(step, loss, records, run)


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
    shape = tuple(raw["shape"])
    whole, start = raw.get("whole"), raw.get("start")
    if whole is None and start is None:
        return TensorRecord(raw["dtype"], shape, raw["xxh3_128"])
    if not (
        isinstance(whole, list)
        and isinstance(start, list)
        and len(whole) == len(start) == len(shape)
        and all(map(is_count, [*whole, *start]))
        and all(first + length <= limit for first, length, limit in zip(start, shape, whole, strict=True))
    ):
        raise ValueError(f"lists tensor {name!r} of {file} as a part of {whole!r} from {start!r} on")
    return TensorRecord(raw["dtype"], shape, raw["xxh3_128"], Place(tuple(whole), tuple(start)))


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a parsed JSON value is a non-negative integer (True and False are not)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def shortened(items: list[str]) -> str:
    """Join the items for a message, a long list cut short."""
    more = len(items) - _MAX_SHOWN
    return ", ".join(items[:_MAX_SHOWN]) + (f" and {more} more" if more > 0 else "")
