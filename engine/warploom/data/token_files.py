"""The file of a token shard: a header of 32 bytes, then unsigned integers, little-endian, to be mapped into memory.

Header: magic, format version, bytes per integer (2, 4 or 8), number of integers, reserved. The document offsets of a
split are kept in the same form with 8 bytes each.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from warploom.errors import UserError

MAGIC = b"WLTOKENS"
VERSION = 1
_HEADER = struct.Struct("<8sIIQQ")
_DTYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned integer that holds every token id."""
    return _DTYPES[2 if vocab_size <= 1 << 16 else 4]


class TokenFileWriter:
    """Appends integers to a new file; it is a token file only once close has written the header."""

    def __init__(self, path: Path, dtype: np.dtype[Any]):
        self._path, self.dtype = path, dtype
        self._hash = xxhash.xxh3_128()
        self._file = open(path, "xb")
        self._file.write(bytes(_HEADER.size))
        self.count = 0

    def append(self, values: np.ndarray) -> None:
        data = values.astype(self.dtype, copy=False).tobytes()
        self._hash.update(data)
        self._file.write(data)
        self.count += len(values)

    def close(self) -> dict[str, Any]:
        """Write the header and return the file's entry for the manifest."""
        self._file.seek(0)
        self._file.write(_HEADER.pack(MAGIC, VERSION, self.dtype.itemsize, self.count, 0))
        self._file.close()
        return {
            "file": self._path.name,
            "count": self.count,
            "size": _HEADER.size + self.count * self.dtype.itemsize,
            "xxh3_128": self._hash.hexdigest(),
        }

    def abandon(self) -> None:
        """Close without a header."""
        self._file.close()


def open_token_file(path: Path) -> np.ndarray:
    """Map a token file: (count,) uint16, uint32 or uint64, read-only.

    Raises UserError naming the file and what is wrong with it.
    """
    try:
        with open(path, "rb") as file:
            header = file.read(_HEADER.size)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"cannot read the token file {path}: {error.strerror}; tokenize again") from error
    if len(header) < _HEADER.size:
        raise UserError(f"the token file {path} is cut short: {size} bytes, not even a header; tokenize again")
    magic, version, itemsize, count, _ = _HEADER.unpack(header)
    if magic != MAGIC:
        raise UserError(f"{path} is no token file: it begins with {magic!r}, not {MAGIC!r}; tokenize again")
    if version != VERSION:
        raise UserError(f"the token file {path} has format version {version}, this is {VERSION}; tokenize again")
    if itemsize not in _DTYPES:
        raise UserError(f"the token file {path} states {itemsize} bytes per token, not 2, 4 or 8; tokenize again")
    if size != _HEADER.size + count * itemsize:
        raise UserError(
            f"the token file {path} has {size} bytes, its {count} tokens need {_HEADER.size + count * itemsize}; "
            "tokenize again"
        )
    if count == 0:
        return np.empty(0, dtype=_DTYPES[itemsize])
    mapped = np.memmap(path, dtype=_DTYPES[itemsize], mode="r", offset=_HEADER.size, shape=(count,))
    return mapped.view(np.ndarray)  # slices of np.memmap cost microseconds each


def checksum(values: np.ndarray) -> str:
    """The checksum of a mapped file's integers, as its manifest entry has it."""
    digest = xxhash.xxh3_128()
    for start in range(0, len(values), 1 << 20):
        digest.update(values[start : start + (1 << 20)].data)
    return digest.hexdigest()
