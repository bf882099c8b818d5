"""Web archives: WARC and WET through fastwarc, and the older ARC format, which it does not read.

A record that is cut short or cannot be parsed is counted and passed over: reading goes on at the next place in the
file that begins a record.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from warploom.curate.optional import optional
from warploom.data.documents import EXPANSION_FLOOR_BYTES, MAX_EXPANSION, open_stream

_HTML = ("text/html", "application/xhtml+xml")
_GZIP_MAGIC = b"\x1f\x8b\x08"


@dataclass(slots=True)
class ArchiveRecord:
    """A response or a conversion with its payload, decoded from chunks and content encoding."""

    number: int
    url: str = ""
    body: bytes = b""
    is_html: bool = False
    charset: str | None = None
    problem: str | None = None
    breaks_file: bool = False


def read_archive(path: Path, start: int, max_bytes: int) -> Iterator[ArchiveRecord]:
    """Yield the records of a .warc, .wet or .arc file that hold a page or a text, after the first `start` of any kind.

    A payload of more than max_bytes, once decoded, is a problem and never held.
    """
    name = path.name.lower()
    if ".arc" in name:
        yield from _read_arc(path, start, max_bytes)
    else:
        yield from _read_warc(path, start, max_bytes)


def _read_warc(path: Path, start: int, max_bytes: int) -> Iterator[ArchiveRecord]:
    warc = optional("fastwarc.warc")
    wanted = (warc.WarcRecordType.response, warc.WarcRecordType.conversion, warc.WarcRecordType.resource)
    size = path.stat().st_size
    limit = max(EXPANSION_FLOOR_BYTES, MAX_EXPANSION * size)
    unfolded = number = position = 0
    with open(path, "rb") as file:
        while True:
            file.seek(position)
            archive = warc.ArchiveIterator(file, parse_http=True, auto_decode="all", fsspec_args=False)
            base = position
            try:
                for record in archive:
                    position = base + record.stream_pos if record.stream_pos < base else record.stream_pos
                    number += 1
                    unfolded += int(record.headers.get("Content-Length", 0))
                    if unfolded > limit:
                        problem = f"{path} unfolds to more than {limit} bytes, over {MAX_EXPANSION} times its size"
                        yield ArchiveRecord(number, problem=problem, breaks_file=True)
                        return
                    if number > start and record.record_type in wanted:
                        yield _from_warc(record, number, max_bytes)
                return
            except (OSError, ValueError, zlib.error):
                number += 1
                if number > start:
                    yield ArchiveRecord(number, problem="damaged record")
            next_position = _next_record(file, position + 1)
            if next_position is None:
                if number >= start:
                    yield ArchiveRecord(
                        number, problem=f"{path} is damaged after record {number - 1}", breaks_file=True
                    )
                return
            position = next_position


def _from_warc(record: Any, number: int, max_bytes: int) -> ArchiveRecord:
    url = (record.headers.get("WARC-Target-URI") or "").strip("<>")
    if url.startswith("metadata:"):  # what wget writes about its own run
        return ArchiveRecord(number, url, problem="not a page: metadata")
    kind = record.http_content_type or (record.headers.get("Content-Type") or "").split(";")[0]
    is_html = kind in _HTML
    if not is_html and kind != "text/plain":
        return ArchiveRecord(number, url, problem=f"not a page: {kind or 'no type'}")
    status = record.http_headers.status_code if record.http_headers is not None else None
    if status is not None and status != 200:
        return ArchiveRecord(number, url, problem=f"HTTP status {status}")
    stated = record.content_length
    body = record.reader.read(max_bytes + 1)
    if len(body) > max_bytes:
        return ArchiveRecord(number, url, problem="too long")
    encoded = record.http_headers is not None and (
        record.http_headers.get("Content-Encoding") or record.http_headers.get("Transfer-Encoding")
    )
    if not encoded and len(body) < stated:
        return ArchiveRecord(number, url, problem="cut short")
    return ArchiveRecord(number, url, body, is_html, record.http_charset)


def _next_record(file: IO[bytes], position: int) -> int | None:
    """Where the next gzip member or plain record begins, from position on."""
    file.seek(position)
    tail = b""
    while chunk := file.read(1 << 20):
        data = tail + chunk
        for match in re.finditer(rb"WARC/1\.[01]\r\n|\x1f\x8b\x08", data):
            place = position - len(tail) + match.start()
            if not match[0].startswith(_GZIP_MAGIC) or _unfolds_to_record(data[match.start() :]):
                return place
        position += len(chunk)
        tail = data[-1024:]
    return None


def _unfolds_to_record(data: bytes) -> bool:
    try:
        return zlib.decompressobj(wbits=31).decompress(data[:1024], 16).startswith(b"WARC/")
    except zlib.error:
        return False


def _read_arc(path: Path, start: int, max_bytes: int) -> Iterator[ArchiveRecord]:
    """ARC 1.0: "URL IP date type length", then so many bytes, an HTTP response, then a line end."""
    number = 0
    with open_stream(path) as file:
        while True:
            header = file.readline(1 << 16)
            if not header:
                return
            if not header.strip():
                continue
            number += 1
            fields = header.decode("latin-1").rsplit(None, 4)
            if len(fields) != 5 or not fields[4].isdigit():
                if number > start:
                    yield ArchiveRecord(number, problem=f"{path} is damaged at record {number}", breaks_file=True)
                return
            url, length = fields[0], int(fields[4])
            if length > max_bytes or url.startswith("filedesc:") or number <= start:
                if length > max_bytes and number > start:
                    yield ArchiveRecord(number, url, problem="too long")
                _skip(file, length)
                continue
            data = file.read(length)
            if len(data) < length:
                yield ArchiveRecord(number, url, problem="cut short")
            else:
                yield _from_http(number, url, data, fields[3], max_bytes)


def _skip(file: IO[bytes], length: int) -> None:
    while length > 0 and (chunk := file.read(min(length, 1 << 20))):
        length -= len(chunk)


def _from_http(number: int, url: str, data: bytes, kind: str, max_bytes: int) -> ArchiveRecord:
    """The response of an ARC record: status line, headers, body."""
    head, separator, body = data.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    status = lines[0].split()[1:2]
    if not separator or not lines[0].startswith("HTTP/") or status != ["200"]:
        return ArchiveRecord(number, url, problem=f"HTTP status {status[0]}" if status else "no HTTP response")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    kind, _, parameters = headers.get("content-type", kind).partition(";")
    if kind.strip() not in (*_HTML, "text/plain"):
        return ArchiveRecord(number, url, problem=f"not a page: {kind.strip()}")
    if headers.get("content-encoding") == "gzip":
        try:
            body = gzip.GzipFile(fileobj=io.BytesIO(body)).read(max_bytes + 1)
        except (OSError, EOFError, zlib.error):
            return ArchiveRecord(number, url, problem="damaged record")
        if len(body) > max_bytes:
            return ArchiveRecord(number, url, problem="too long")
    charset = parameters.partition("charset=")[2].strip(" \"'") or None
    return ArchiveRecord(number, url, body, kind.strip() in _HTML, charset)
