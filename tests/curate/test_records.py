"""Every format in, resumption at any record, damage counted, bombs stopped."""

import gzip
import json
import lzma
import tracemalloc

import pytest
import zstandard

from warploom.curate import archives, records
from warploom.curate.records import read_records
from warploom.data import documents

ROWS = [{"text": f"text {i} \u00e9", "url": f"http://a.example/{i}"} for i in range(7)]


def write(path, rows=ROWS):
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(data))
    return str(path)


def write_parquet(path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=3)
    return str(path)


def write_arrow(path):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as stream:
        for batch in table.to_batches(max_chunksize=3):
            stream.write_batch(batch)
    return str(path)


def write_wet(path):
    with open(path, "wb") as file:
        for row in ROWS:
            body = row["text"].encode()
            head = (
                f"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Target-URI: {row['url']}\r\nContent-Type: text/plain\r\n"
                f"WARC-Record-ID: <urn:uuid:1>\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            file.write(gzip.compress(head.encode() + body + b"\r\n\r\n"))
    return str(path)


FORMATS = {
    "a.jsonl": write,
    "c4.00000-of-01024.json.gz": write,
    "pile.jsonl.zst": write,
    "a.jsonl.xz": write,
    "refinedweb.parquet": write_parquet,
    "data-00000-of-00001.arrow": write_arrow,
    "a.warc.wet.gz": write_wet,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_and_goes_on_anywhere(tmp_path, name):
    path = FORMATS[name](tmp_path / name)
    whole = list(read_records(path))
    assert [(r.text, r.url, r.problem) for r in whole] == [(row["text"], row["url"], None) for row in ROWS]
    for start in range(len(ROWS) + 1):
        assert list(read_records(path, start)) == whole[start:]


def test_text_columns_of_known_data_sets(tmp_path):
    starcoder = [{"content": "x = 1", "max_stars_repo_name": "a/b"}]
    pile = [{"text": "words", "meta": {"pile_set_name": "X"}}]
    assert next(read_records(write(tmp_path / "s.jsonl", starcoder))).text == "x = 1"
    assert next(read_records(write(tmp_path / "p.jsonl", pile))).text == "words"
    assert next(read_records(write(tmp_path / "q.jsonl", [{"body": "b"}]), text_column="body")).text == "b"


def test_pages_and_plain_texts(tmp_path):
    (tmp_path / "a.html").write_bytes(b"<p>caf\xe9")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwords")
    assert [r.html for r in read_records(str(tmp_path / "a.html"))] == [b"<p>caf\xe9"]
    assert [r.text for r in read_records(str(tmp_path / "a.txt"))] == ["words"]


def test_a_data_set_by_name(tmp_path):
    pytest.importorskip("datasets")
    write(tmp_path / "train.jsonl")
    found = list(read_records(f"hf:{tmp_path}:train", start=2))
    assert [r.text for r in found] == [row["text"] for row in ROWS[2:]]


def test_a_damaged_line_is_counted_and_passed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": \n[1]\n{"other": "x"}\n{"text": 5}\n\n{"text": "last"}')
    found = [(r.number, r.text, r.problem) for r in read_records(str(path))]
    problems = ["not JSON", "not an object", "no such field", "not a string"]
    assert found == [(1, "one", None), *((i, None, p) for i, p in enumerate(problems, 2)), (7, "last", None)]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl.xz"])
def test_a_file_that_breaks_off_is_named(tmp_path, name):
    # Random letters: compressed data that is cut must not hold all rows already.
    import random

    rows = [{"text": "".join(random.Random(i).choices("abcdefghij", k=20_000))} for i in range(40)]
    path = tmp_path / name
    write(path, rows)
    path.write_bytes(path.read_bytes()[:-2000])
    found = list(read_records(str(path)))
    assert found[-1].breaks_file and str(path) in found[-1].problem
    assert len(found) > 10 and all(r.problem is None for r in found[:-1])


def test_a_missing_file_is_named(tmp_path):
    (found,) = read_records(str(tmp_path / "gone.jsonl"))
    assert found.breaks_file and "gone.jsonl" in found.problem


def bomb(size):
    """A zstandard frame that states its size, which makes the library ignore its own limit."""
    return zstandard.ZstdCompressor(write_content_size=True).compress(b" " * size)


def test_a_bomb_is_stopped_by_the_bytes_that_come_out(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "EXPANSION_FLOOR_BYTES", 1 << 20)
    path = tmp_path / "bomb.jsonl.zst"
    path.write_bytes(bomb(200 << 20))
    tracemalloc.start()
    found = list(read_records(str(path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found[-1].breaks_file and "unfolds to more than" in found[-1].problem
    assert peak < 80 << 20


def test_an_endless_line_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 1000)
    path = write(tmp_path / "a.jsonl", [{"text": "x" * 5000}, {"text": "short"}])
    assert [(r.text, r.problem) for r in read_records(path)] == [(None, "too long"), ("short", None)]


def response(body, headers="", status="200 OK", kind="text/html"):
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{headers}\r\n".encode() + body


def warc_record(payload, url="http://a.example/", kind="response"):
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nWARC-Record-ID: <urn:uuid:1>\r\n"
        f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload + b"\r\n\r\n"


PAYLOADS = [
    response(b"<p>one"),
    response(gzip.compress(b"<p>two"), "Content-Encoding: gzip\r\n"),
    response(b"6\r\n<p>thr\r\n2\r\nee\r\n0\r\n\r\n", "Transfer-Encoding: chunked\r\n"),
    response(b"gone", status="404 Not Found"),
    response(b"\x89PNG", kind="image/png"),
    response(gzip.compress(b"x" * 5_000_000), "Content-Encoding: gzip\r\n"),
    response(b"<p>last"),
]
EXPECTED = [b"<p>one", b"<p>two", b"<p>three", "HTTP status 404", "not a page: image/png", "too long", b"<p>last"]


@pytest.mark.parametrize("packed", [True, False])
def test_responses_of_a_web_archive(tmp_path, monkeypatch, packed):
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 1 << 20)
    path = tmp_path / ("a.warc.gz" if packed else "a.warc")
    parts = [warc_record(payload) for payload in PAYLOADS]
    path.write_bytes(b"".join(map(gzip.compress, parts)) if packed else b"".join(parts))
    found = list(read_records(str(path)))
    assert [r.html if r.html is not None else r.problem for r in found] == EXPECTED
    for start in range(len(found) + 1):
        assert list(read_records(str(path), start)) == found[start:]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("damage", [b"XXXX/1.0\r\n", b"WARC/1.0\r\nContent-Length: many\r\n\r\n"])
def test_reading_goes_on_after_a_damaged_record(tmp_path, packed, damage):
    pack = gzip.compress if packed else bytes
    path = tmp_path / ("a.warc.gz" if packed else "a.warc")
    good = [pack(warc_record(response(b"<p>%d" % i))) for i in range(4)]
    path.write_bytes(b"".join([good[0], good[1], pack(damage + b"junk" * 50), good[2], good[3]]))
    found = list(read_records(str(path)))
    assert [r.html for r in found if r.html] == [b"<p>0", b"<p>1", b"<p>2", b"<p>3"]
    assert "damaged record" in {r.problem for r in found}


def test_a_web_archive_cut_in_the_middle_of_a_record_is_named(tmp_path):
    path = tmp_path / "a.warc.gz"
    data = b"".join(gzip.compress(warc_record(response(b"<p>%d" % i * 500))) for i in range(3))
    path.write_bytes(data[:-30])
    found = list(read_records(str(path)))
    assert [bool(r.html) for r in found[:2]] == [True, True]
    assert all(r.problem for r in found[2:]) and len(found) > 2


def test_a_web_archive_that_unfolds_without_measure_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "EXPANSION_FLOOR_BYTES", 1 << 20)
    path = tmp_path / "bomb.warc.gz"
    path.write_bytes(b"".join(gzip.compress(warc_record(response(b" " * 600_000))) for _ in range(8)))
    monkeypatch.setattr(archives, "MAX_EXPANSION", 10)
    found = list(read_records(str(path)))
    assert found[-1].breaks_file and "unfolds to more than" in found[-1].problem and len(found) < 8


def test_the_archives_of_other_tools(shared_data):
    """Real files with known faults: none raises, and what can be read is."""
    pages = {}
    for path in sorted((shared_data / "web").rglob("*")):
        if path.is_file() and path.name.lower().endswith(records.ENDINGS) and "arc" in path.name:
            found = list(read_records(str(path)))
            pages[path.name] = sum(r.html is not None or r.text is not None for r in found)
            for start in range(1, len(found) + 1, 5):
                rest = list(read_records(str(path), found[start - 1].number))
                assert rest == found[start:]
    assert pages["dolma-sample-0001.warc.gz"] == 15
    assert pages["whirlwind.warc.gz"] == pages["whirlwind.warc.wet.gz"] == 1
    for name in ("example.arc", "example.arc.gz", "example.warc", "example.warc.gz", "example-trunc.warc"):
        assert pages[name] == 1, name


def test_arc_bodies_are_decoded(tmp_path):
    payload = response(gzip.compress(b"<p>page"), "Content-Encoding: gzip\r\n")
    head = f"http://a.example/ 1.2.3.4 20010101000000 text/html {len(payload)}\n".encode()
    about = b"1 0 test\nURL IP-address Archive-date Content-type Archive-length\n"
    first = f"filedesc://a.arc 0.0.0.0 20010101000000 text/plain {len(about)}\n".encode() + about
    path = tmp_path / "a.arc"
    path.write_bytes(first + b"\n" + head + payload + b"\n" + b"nonsense\n")
    found = list(read_records(str(path)))
    assert found[0].html == b"<p>page" and found[0].url == "http://a.example/"
    assert found[-1].breaks_file
