"""The safetensors container: build its header, and check a file's header before the safetensors library opens it.

The library guards its own memory, but accepts a key that appears twice (0.8.0) and has no checksums; the check here
refuses the first and the manifest adds the second.
"""

from __future__ import annotations

import json
import math
import reprlib
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from warploom.checkpoint.format import is_count, parse_json

MAX_HEADER_BYTES = 100_000_000  # the library's own limit

DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
_ITEM_BYTES = {code: dtype.itemsize for dtype, code in DTYPE_CODES.items()}
_MAX_DIMS = 64  # torch's limit

# Values of an untrusted header may be megabytes long; the reason for refusing them should not be.
_shown = reprlib.Repr()
_shown.maxstring = _shown.maxlong = 200


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: where its bytes lie, counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def build_header(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> tuple[bytes, list[str]]:
    """Return the header of a safetensors file of these tensors, and the order in which their bytes must follow.

    metadata: what the header says beside the tensors. Wide dtypes come first, so that every tensor is aligned to its
    element.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in DTYPE_CODES:
            raise TypeError(f"tensor {name!r} has dtype {tensor.dtype}, which a checkpoint cannot hold")
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPE_CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def tensor_bytes(tensor: Tensor) -> memoryview:
    """View a tensor's elements as bytes in row-major order; copies only what is on a device or not contiguous."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_header(file: BinaryIO, file_bytes: int) -> dict[str, Entry]:
    """Return the tensors of parse_header alone; errors as there."""
    return parse_header(file, file_bytes)[0]


def parse_header(file: BinaryIO, file_bytes: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Parse and check the header of an untrusted safetensors file of file_bytes bytes, opened at its start.

    Refuses, with a ValueError that gives the reason, whatever is not exactly one run of tensors that fills the file:
    wrong lengths, repeated names, unknown dtypes, shapes that do not match their bytes, overlaps, holes, bytes behind
    the last tensor. Reads at most the header. Returns the tensors and the metadata.
    """
    prefix = file.read(8)
    header_bytes = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
        if prefix[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            raise ValueError("is a pickle or a zip of pickles, which is never opened; convert it to safetensors")
        raise ValueError(f"is no safetensors file: it has {file_bytes} bytes and a header length of {header_bytes}")
    text = file.read(header_bytes)
    if not text.startswith(b"{"):
        raise ValueError("is no safetensors file: its header is not a JSON object")
    try:
        raw = parse_json(text)
        if b"\\u" in text:
            json.dumps(raw, ensure_ascii=False).encode()  # half of a surrogate pair is no text: the library refuses it
    except ValueError as error:
        raise ValueError(f"has a header that cannot be read: {error}") from error
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("has __metadata__ that is not an object of strings")
    data_start = 8 + header_bytes
    entries = {name: _entry(name, value, data_start) for name, value in raw.items()}
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            flaw = "a hole before" if entry.start > position else "an overlap at"
            raise ValueError(f"has {flaw} tensor {_shown.repr(name)}")
        position = entry.end
    if position != file_bytes:
        raise ValueError(f"has {file_bytes} bytes, its header accounts for {position}")
    return entries, metadata


def _entry(name: str, raw: object, data_start: int) -> Entry:
    shown = _shown.repr(name)
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"has a header entry {shown} without exactly dtype, shape and data_offsets")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise ValueError(f"has tensor {shown} of unknown dtype {_shown.repr(dtype)}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(map(_is_int64, shape)):
        raise ValueError(f"has tensor {shown} of shape {_shown.repr(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_int64, offsets)):
        raise ValueError(f"has tensor {shown} with data_offsets {_shown.repr(offsets)}")
    if offsets[1] - offsets[0] != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise ValueError(f"has tensor {shown} of {dtype} {shape} in {offsets[1] - offsets[0]} bytes")
    return Entry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _is_int64(value: object) -> bool:
    return is_count(value) and value < 2**63
