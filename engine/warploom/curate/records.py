"""Records of the files that curation starts from: web archives, JSON lines, Parquet and Arrow tables, pages, texts.

Every file is a stream of numbered records, so a position in it is one number, and reading goes on from there. Memory
is bounded by the largest record. What cannot be used is yielded with its problem, to be counted; a file that breaks
off is yielded with the problem that names it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from warploom.curate.archives import ArchiveRecord, read_archive
from warploom.curate.optional import optional
from warploom.data.documents import MAX_DOCUMENT_BYTES, open_stream
from warploom.errors import UserError

MAX_RECORD_BYTES = 32 << 20
_TEXT_COLUMNS = ("text", "content", "raw_content", "document")
HUGGING_FACE = "hf:"


@dataclass(slots=True)
class Record:
    """One record: text or html, or a problem. number: its place in the file, from 1."""

    number: int
    text: str | None = None
    html: bytes | None = None
    url: str = ""
    charset: str | None = None
    problem: str | None = None
    breaks_file: bool = False


def read_records(path: str, start: int = 0, text_column: str = "auto") -> Iterator[Record]:
    """Yield the records of a file from number start + 1 on.

    path: a file of a kind in ENDINGS, or "hf:NAME" or "hf:NAME:SPLIT", a data set that the library `datasets` can load.
    text_column: field of the text; "auto" takes the first of text, content, raw_content, document.
    """
    if path.startswith(HUGGING_FACE):
        yield from itertools.islice(_read_hugging_face(path, text_column), start, None)
        return
    read = next(reader for ending, reader in _READERS.items() if path.lower().endswith(ending))
    number = start
    try:
        for record in read(Path(path), start, text_column):
            number = record.number
            yield record
    except OSError as error:
        yield Record(number + 1, problem=f"cannot read {path}: {error.strerror or error}", breaks_file=True)
    except UserError as error:  # open_stream: damaged, or a bomb
        yield Record(number + 1, problem=str(error), breaks_file=True)


def _read_text(path: Path, start: int, text_column: str) -> Iterator[Record]:
    if start == 0:
        yield _whole_file(path, lambda data: Record(1, text=data.decode("utf-8-sig", "replace")))


def _read_html(path: Path, start: int, text_column: str) -> Iterator[Record]:
    if start == 0:
        yield _whole_file(path, lambda data: Record(1, html=data))


def _whole_file(path: Path, make: Callable[[bytes], Record]) -> Record:
    if path.stat().st_size > MAX_DOCUMENT_BYTES:
        return Record(1, problem="too long")
    return make(path.read_bytes())


def _read_json_lines(path: Path, start: int, text_column: str) -> Iterator[Record]:
    orjson = optional("orjson")
    with open_stream(path) as file:
        number = 0
        while line := file.readline(MAX_RECORD_BYTES + 1):
            number += 1
            if len(line) > MAX_RECORD_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(1 << 20)
                if number > start:
                    yield Record(number, problem="too long")
            elif number > start and line.strip():
                try:
                    row = orjson.loads(line)
                except ValueError:
                    yield Record(number, problem="not JSON")
                    continue
                yield _from_row(row, number, text_column)


def _from_row(row: object, number: int, text_column: str) -> Record:
    if not isinstance(row, Mapping):
        return Record(number, problem="not an object")
    if text_column == "auto":
        text = next((row[name] for name in _TEXT_COLUMNS if name in row), None)
    else:
        text = row.get(text_column)
    if text is None:
        return Record(number, problem="no such field")
    if not isinstance(text, str):
        return Record(number, problem="not a string")
    url = row.get("url") or (row.get("meta") or row.get("metadata") or {})
    if isinstance(url, Mapping):
        url = url.get("url", "")
    return Record(number, text=text, url=url if isinstance(url, str) else "")


def _read_parquet(path: Path, start: int, text_column: str) -> Iterator[Record]:
    parquet, arrow = optional("pyarrow.parquet", "parquet"), optional("pyarrow", "parquet")
    try:
        with parquet.ParquetFile(path) as file:
            columns = _columns(file.schema_arrow.names, text_column, path)
            number = 0
            for group in range(file.num_row_groups):
                num_rows = file.metadata.row_group(group).num_rows
                if number + num_rows <= start:
                    number += num_rows
                    continue
                for batch in file.iter_batches(256, row_groups=[group], columns=columns, use_threads=False):
                    for row in batch.to_pylist():
                        number += 1
                        if number > start:
                            yield _from_row(row, number, text_column)
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _read_arrow(path: Path, start: int, text_column: str) -> Iterator[Record]:
    """A file of a Hugging Face data set on disk (save_to_disk): the Arrow stream format."""
    arrow = optional("pyarrow", "parquet")
    try:
        with arrow.memory_map(str(path)) as source, arrow.ipc.open_stream(source) as stream:
            columns = _columns(stream.schema.names, text_column, path)
            number = 0
            for batch in stream:
                if number + batch.num_rows <= start:
                    number += batch.num_rows
                    continue
                for row in batch.select(columns).to_pylist():
                    number += 1
                    if number > start:
                        yield _from_row(row, number, text_column)
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _columns(names: list[str], text_column: str, path: Path) -> list[str]:
    wanted = _TEXT_COLUMNS if text_column == "auto" else (text_column,)
    text = next((name for name in wanted if name in names), None)
    if text is None:
        raise UserError(
            f"{path} has no column {' or '.join(wanted)}, its columns are {', '.join(names)}; set text_column"
        )
    return [text, *(name for name in ("url", "meta", "metadata") if name in names)]


def _read_hugging_face(name: str, text_column: str) -> Iterator[Record]:
    datasets = optional("datasets", "datasets")
    _, _, rest = name.partition(HUGGING_FACE)
    dataset, _, split = rest.partition(":")
    rows = datasets.load_dataset(dataset, split=split or "train", streaming=True)
    for number, row in enumerate(rows, 1):
        yield _from_row(row, number, text_column)


def _read_web_archive(path: Path, start: int, text_column: str) -> Iterator[Record]:
    for record in read_archive(path, start, MAX_RECORD_BYTES):
        yield _from_archive(record)


def _from_archive(record: ArchiveRecord) -> Record:
    if record.problem is not None:
        return Record(record.number, url=record.url, problem=record.problem, breaks_file=record.breaks_file)
    if record.is_html:
        return Record(record.number, html=record.body, url=record.url, charset=record.charset)
    return Record(record.number, text=record.body.decode("utf-8", "replace"), url=record.url)


_Reader = Callable[[Path, int, str], Iterator[Record]]
_READERS: dict[str, _Reader] = {
    **{f".{kind}{packed}": _read_web_archive for kind in ("warc", "wet", "arc") for packed in ("", ".gz", ".zst")},
    **{f".{kind}{packed}": _read_json_lines for kind in ("jsonl", "json") for packed in ("", ".gz", ".xz", ".zst")},
    **{ending: _read_text for ending in (".txt", ".md", ".rst", ".py")},
    **{ending: _read_html for ending in (".html", ".htm")},
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
ENDINGS = tuple(_READERS)
