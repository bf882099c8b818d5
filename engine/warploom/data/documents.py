"""Read text documents from files, folders and globs as a stream.

A text file is one document; a JSON-lines or Parquet file holds one per line or row. Memory is bounded by the largest
document, never by a file of many, and a compressed file that unfolds without measure is stopped while it streams.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import io
import json
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import zstandard

from warploom.errors import UserError

MAX_DOCUMENT_BYTES = 256 << 20
# A compressed file may unfold to this many times its size (text reaches 10), or to the floor if it is tiny.
MAX_EXPANSION = 1000
EXPANSION_FLOOR_BYTES = 64 << 20

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


def read_documents(
    paths: Paths,
    text_column: str = "text",
    on_bad_utf8: Literal["error", "replace"] = "error",
    on_bad_line: Literal["error", "skip"] = "error",
    counts: Counter[str] | None = None,
) -> Iterator[tuple[str, str]]:
    """Yield (source, text) for each document of the files that list_files finds, in its order.

    source is "file" for text files, "file:line" or "file:row" otherwise. Text is yielded as it stands, line ends
    included, except that a leading byte order mark is dropped. Empty documents are left out.
    on_bad_utf8: "replace" puts U+FFFD where a file is not UTF-8. on_bad_line: "skip" leaves out a line or row that
    holds no usable text: not JSON, no such field, not a string, a key twice, NaN, nested too deeply, a lone surrogate,
    over MAX_DOCUMENT_BYTES. counts, if given, receives how many documents were left out or changed, by reason.
    Raises UserError for whatever is not forgiven by these two, and if no document at all was found.
    """
    yield from _read(paths, _Options(text_column, on_bad_utf8, on_bad_line, Counter() if counts is None else counts))


def read_records(
    paths: Paths,
    on_bad_utf8: Literal["error", "replace"] = "error",
    on_bad_line: Literal["error", "skip"] = "error",
    counts: Counter[str] | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (source, object) for each line of JSON-lines files, whole; else as read_documents.

    Raises UserError for a file of another kind, too.
    """
    for path in list_files(paths):
        if ".jsonl" not in path.name.lower():
            raise UserError(f"{path} is no JSON-lines file; give .jsonl, .jsonl.gz, .jsonl.xz or .jsonl.zst")
    yield from _read(paths, _Options(None, on_bad_utf8, on_bad_line, Counter() if counts is None else counts))


def _read(paths: Paths, options: _Options) -> Iterator[tuple[str, Any]]:
    files = list_files(paths)
    found = False
    for path in files:
        read = _reader(path)
        assert read is not None, path
        try:
            for place, text in read(path, options):
                if not text:
                    options.counts["empty"] += 1
                    continue
                found = True
                yield f"{path}:{place}" if place else str(path), text
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if not found:
        left_out = ", ".join(f"{count} {reason}" for reason, count in options.counts.items()) or "none"
        raise UserError(f"no text found in {len(files)} file(s) from {files[0]} on (documents left out: {left_out})")


def list_files(paths: Paths, endings: Sequence[str] | None = None) -> list[Path]:
    """List the readable files behind paths, each once: folders recursively and sorted, then globs, then single files
    as given. Hidden files, and files of other kinds inside folders and globs, are passed over.

    endings: of the files that count as readable, those of read_documents by default.

    Raises UserError for a missing path, a pattern or folder without a readable file, and for a file named directly
    that is empty or of an unknown kind.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    known = tuple(_READERS) if endings is None else tuple(endings)

    def readable(path: Path) -> bool:
        return path.name.lower().endswith(known)

    files: dict[Path, None] = {}
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            found = sorted(_walk(path))
            if not any(map(readable, found)):
                raise UserError(f"the folder {path} has no readable file: {_seen(found, known)}")
        elif path.exists():
            found = [path]
            if not readable(path):
                raise UserError(f"{path} is of an unknown kind; known are {' '.join(known)}")
            if path.stat().st_size == 0:
                raise UserError(f"{path} is empty")
        elif glob.has_magic(str(path)):
            found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
            if not any(map(readable, found)):
                raise UserError(f"the pattern {str(path)!r} matches no readable file: {_seen(found, known)}")
        else:
            raise UserError(f"{path} does not exist")
        files.update((file, None) for file in found if readable(file))
    if not files:
        raise UserError("no path to read was given")
    return list(files)


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(root, name) for name in names if not name.startswith("."))


def _seen(files: list[Path], known: Sequence[str]) -> str:
    if not files:
        return "nothing is there"
    endings = sorted({path.suffix or path.name for path in files})
    return f"it has {', '.join(endings[:8])}{' ...' if len(endings) > 8 else ''}; known are {' '.join(known)}"


@dataclass(frozen=True)
class _Options:
    text_column: str | None  # None: whole records
    on_bad_utf8: str
    on_bad_line: str
    counts: Counter[str] = field(compare=False)

    def bad_line(self, place: str, reason: str, detail: str) -> None:
        """Count the line, or raise: reason names the class, detail completes the sentence "<place> ..."."""
        if self.on_bad_line == "error":
            raise UserError(f"{place} {detail}, or set on-bad-line to skip")
        self.counts[reason] += 1


def _decode(data: bytes, path: Path, offset: int, options: _Options) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if options.on_bad_utf8 == "error":
            raise UserError(
                f"{path} is not UTF-8 at byte {offset + error.start} (0x{data[error.start]:02x}); "
                "convert it, or set on-bad-utf8 to replace"
            ) from error
        options.counts["not UTF-8, replaced"] += 1
        return data.decode("utf-8", "replace")


def _read_text(path: Path, options: _Options) -> Iterator[tuple[str, str]]:
    size = path.stat().st_size
    if size > MAX_DOCUMENT_BYTES:
        raise UserError(
            f"{path} has {size} bytes as one document, the limit is {MAX_DOCUMENT_BYTES}; split it into files or lines "
            "of .jsonl"
        )
    data = path.read_bytes()
    bom = len(_BOM) if data.startswith(_BOM) else 0
    yield "", _decode(data[bom:], path, bom, options)


_BOM = b"\xef\xbb\xbf"


@contextlib.contextmanager
def open_stream(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to read its bytes, unfolded if it ends in .gz, .xz or .zst, and stopped where it unfolds to more than
    MAX_EXPANSION times its size. Inside the block, a damaged or cut file raises UserError naming it."""
    unfold = _UNFOLD.get(path.suffix.lower())
    try:
        with open(path, "rb") as file:
            if unfold is None:
                yield file
            else:
                limit = max(EXPANSION_FLOOR_BYTES, MAX_EXPANSION * path.stat().st_size)
                with unfold(file) as stream, io.BufferedReader(_Capped(stream, path, limit), 1 << 18) as unfolded:
                    yield unfolded
    # gzip raises a subclass of OSError for a bad header or checksum.
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise UserError(f"{path} is damaged or cut short: {str(error).strip() or type(error).__name__}") from error


def _read_jsonl(path: Path, options: _Options) -> Iterator[tuple[str, str]]:
    with open_stream(path) as lines:
        yield from _json_lines(lines, path, options)


def _json_lines(file: IO[bytes], path: Path, options: _Options) -> Iterator[tuple[str, Any]]:
    offset = 0
    number = 0
    while line := file.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        place = f"{path}:{number}"
        start, offset = offset, offset + len(line)
        if len(line) > MAX_DOCUMENT_BYTES:
            options.bad_line(place, "too long", f"is longer than {MAX_DOCUMENT_BYTES} bytes; split that document")
            while line and not line.endswith(b"\n"):
                line = file.readline(1 << 20)
                offset += len(line)
            continue
        if number == 1 and line.startswith(_BOM):
            line, start = line[len(_BOM) :], start + len(_BOM)
        if not line.strip():
            continue
        try:
            record = _record(_decode(line, path, start, options))
            value = record if options.text_column is None else _text_field(record, options.text_column)
        except _BadLine as bad:
            options.bad_line(place, bad.reason, bad.detail)
            continue
        yield str(number), value


class _BadLine(Exception):
    def __init__(self, reason: str, detail: str):
        self.reason, self.detail = reason, detail


def _record(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except RecursionError:
        raise _BadLine("nested too deeply", "is JSON nested too deeply; flatten it") from None
    except ValueError as error:  # also an integer of more digits than Python converts
        raise _BadLine("not JSON", f"is not JSON ({error}); mend it") from None
    if not isinstance(record, dict):
        raise _BadLine("not an object", f"is a JSON {type(record).__name__}, not an object; give one object per line")
    return record


def _text_field(record: dict[str, Any], column: str) -> str:
    if column not in record:
        fields = ", ".join(map(repr, list(record)[:12])) or "none"
        raise _BadLine("no such field", f"has no field {column!r}, its fields are {fields}; name one as text-column")
    return _checked_text(record[column], column)


def _checked_text(text: object, column: str) -> str:
    if not isinstance(text, str):
        raise _BadLine("not a string", f"has {type(text).__name__} in {column!r}, not a string; name another column")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _BadLine(
                "lone surrogate", f"has a lone surrogate at character {error.start} of {column!r}; remove it"
            ) from None
    return text


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _BadLine("duplicate key", f"has the key {twice!r} twice; keep one")
    return record


def _refuse_constant(name: str) -> None:
    raise _BadLine("NaN or Infinity", f"has {name}, which is not JSON; write null")


def _read_parquet(path: Path, options: _Options) -> Iterator[tuple[str, str]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"reading {path} needs pyarrow: pip install 'warploom[parquet]'") from error
    column = options.text_column
    assert column is not None  # whole records are read from JSON lines alone
    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                names = ", ".join(map(repr, file.schema_arrow.names))
                raise UserError(f"{path} has no column {column!r}, its columns are {names}; name one as text-column")
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[column], use_threads=False):
                for text in batch.column(0).to_pylist():
                    row += 1
                    try:
                        yield str(row), _checked_text(text, column)
                    except _BadLine as bad:
                        options.bad_line(f"{path}:{row}", bad.reason, bad.detail)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


class _Capped(io.RawIOBase):
    """Passes bytes through and stops a file that unfolds to more than limit."""

    def __init__(self, stream: Any, path: Path, limit: int):
        self._stream, self._path, self._limit, self._total = stream, path, limit, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        self._total += count
        if self._total > self._limit:
            raise UserError(
                f"{self._path} unfolds to more than {self._limit} bytes, over {MAX_EXPANSION} times its size; "
                "if that is meant, decompress it first"
            )
        return count


class _ZstdStream(io.RawIOBase):
    """A zstandard file, frame after frame. zstandard's own stream_reader ends without a word where a file was cut."""

    # A block of 4 bytes can unfold to 128 KiB, so this much input makes at most 64 MiB at once.
    _INPUT_BYTES = 2048

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._file.read(self._INPUT_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the last zstandard frame is not complete")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
            self._output = memoryview(self._frame.decompress(self._input))
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count


_UNFOLD: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".xz": lzma.LZMAFile,
    ".zst": _ZstdStream,
}
_READERS: dict[str, Callable[[Path, _Options], Iterator[tuple[str, str]]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".py": _read_text,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".jsonl.xz": _read_jsonl,
    ".jsonl.zst": _read_jsonl,
    ".parquet": _read_parquet,
}


def _reader(path: Path) -> Callable[[Path, _Options], Iterator[tuple[str, str]]] | None:
    name = path.name.lower()
    return next((read for ending, read in _READERS.items() if name.endswith(ending)), None)
