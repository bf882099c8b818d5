"""Rows of benchmark files: JSON, JSON lines, CSV, Parquet, Arrow, compressed, inside a tar, or in a folder that the
`datasets` library saved. The one reader of what `warploom eval` scores and what curation decontaminates against."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from warploom.data.documents import open_stream
from warploom.errors import UserError, optional

TASK_ENDINGS = tuple(
    f".{kind}{packed}" for kind in ("jsonl", "json", "csv", "tar") for packed in ("", ".gz", ".xz", ".zst")
) + (".parquet", ".arrow")
# What `datasets` writes beside the rows: words about the data set, none of its items.
_ABOUT = ("dataset_info.json", "dataset_dict.json", "state.json")


def read_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield (name, row) of a task file: name is that of the file, or of the member of a tar.

    A row is the JSON value of a line, an element of the list that a JSON file is (or else all of it), the cells of a
    line of CSV, or the columns of Parquet or Arrow by name. Nothing is unpacked to the disk; names in a tar are only
    looked at. Raises UserError naming a file that cannot be read.
    """
    name = file.name.lower()
    try:
        if name.endswith(".parquet"):
            for batch in optional("pyarrow.parquet", "parquet").ParquetFile(file).iter_batches():
                yield from ((file.name, row) for row in batch.to_pylist())
        elif name.endswith(".arrow"):
            # Not memory-mapped: a file that is cut while it is read is then an error and not a dead process.
            with open(file, "rb") as arrow, optional("pyarrow", "parquet").ipc.open_stream(arrow) as batches:
                for batch in batches:
                    yield from ((file.name, row) for row in batch.to_pylist())
        else:
            with open_stream(file) as stream:
                yield from _members(stream, name) if ".tar" in name else _parse(stream, file.name)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError, csv.Error, tarfile.TarError) as error:  # pyarrow's errors are ValueErrors too
        raise UserError(f"{file} is damaged or no task file: {error}") from error


def _members(stream: IO[bytes], name: str) -> Iterator[tuple[str, Any]]:
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            inner = archive.extractfile(member) if member.isfile() else None
            if inner is not None:
                yield from _parse(io.BytesIO(inner.read()), member.name)


def _parse(stream: IO[bytes], path: str) -> Iterator[tuple[str, Any]]:
    name = path.lower()
    if ".csv" in name:
        for cells in csv.reader(line.decode("utf-8-sig", "replace") for line in stream):
            yield path, cells
    elif ".jsonl" in name:
        for line in stream:
            if line.strip():
                yield path, json.loads(line)
    elif ".json" in name and not name.endswith(_ABOUT):
        value = json.loads(stream.read())
        for row in value if isinstance(value, list) else [value]:
            yield path, row
