"""Documents: which files are read, what comes out of each kind, and what is refused with which words."""

import gzip
import json
import lzma
from collections import Counter

import pytest
import zstandard

from warploom.data import documents
from warploom.data.documents import list_files, read_documents
from warploom.errors import UserError


def texts(paths, **options):
    return [text for _, text in read_documents(paths, **options)]


def jsonl(*texts):
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


COMPRESS = {
    ".jsonl": bytes,
    ".jsonl.gz": gzip.compress,
    ".jsonl.xz": lzma.compress,
    ".jsonl.zst": lambda data: zstandard.ZstdCompressor().compress(data),
}
compressed = pytest.mark.parametrize("ending", list(COMPRESS)[1:])


def test_a_folder_is_read_recursively_sorted_without_hidden_and_foreign_files(tmp_path):
    for name in ("b.txt", "a/z.md", "a/c.py", ".hidden.txt", ".git/x.txt", "a/.y.md", "picture.png", "empty.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if "empty" in name else name)
    counts = Counter()
    assert texts(tmp_path, counts=counts) == ["a/c.py", "a/z.md", "b.txt"]
    assert counts == {"empty": 1}


def test_globs_single_files_and_folders_mix_and_each_file_is_read_once(tmp_path):
    for name in ("x/1.txt", "x/2.txt", "y/3.txt", "[4].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    paths = [tmp_path / "y/3.txt", str(tmp_path / "**/*.txt"), tmp_path / "x", tmp_path / "[4].txt"]
    assert texts(paths) == ["y/3.txt", "[4].txt", "x/1.txt", "x/2.txt"]


def test_the_source_of_a_document_is_its_file_and_line(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_bytes(jsonl("two") + b"\n \n" + jsonl("three"))
    sources = [source for source, _ in read_documents(tmp_path)]
    assert sources == [f"{tmp_path}/a.txt", f"{tmp_path}/b.jsonl:1", f"{tmp_path}/b.jsonl:4"]


def test_text_is_kept_as_it_stands_but_for_a_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf a\r\n\xef\xbb\xbfb\x00\n")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl("x\r\n"))
    assert texts(tmp_path) == [" a\r\n\ufeffb\x00\n", "x\r\n"]


@pytest.mark.parametrize("ending", COMPRESS)
def test_json_lines_in_every_compression(tmp_path, ending):
    expected = [f"document {i}\n" * (i % 7 + 1) for i in range(3000)]
    # Two members or frames, as `cat a.gz b.gz` makes them.
    data = COMPRESS[ending](jsonl(*expected[:1000])) + COMPRESS[ending](jsonl(*expected[1000:]))
    (tmp_path / f"c{ending}").write_bytes(data)
    assert texts(tmp_path) == expected


def test_zstandard_skippable_frames_are_skipped(tmp_path):
    skippable = (0x184D2A50).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"abc"
    data = skippable + zstandard.ZstdCompressor().compress(jsonl("a")) + skippable
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    assert texts(tmp_path) == ["a"]


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [f"row {i} \u00e9" for i in range(1000)]
    table = pa.table({"body": rows, "n": list(range(1000))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    assert texts(tmp_path, text_column="body") == rows
    with pytest.raises(UserError, match=r"a.parquet has no column 'text', its columns are 'body', 'n'"):
        texts(tmp_path)
    with pytest.raises(UserError, match=r"a.parquet:1 has int in 'n', not a string"):
        texts(tmp_path, text_column="n")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[:-20])
    with pytest.raises(UserError, match="a.parquet is damaged"):
        texts(tmp_path, text_column="body")


def test_parquet_with_a_null_row(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": ["a", None, "b"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet:2 has NoneType"):
        texts(tmp_path)
    counts = Counter()
    assert texts(tmp_path, on_bad_line="skip", counts=counts) == ["a", "b"]
    assert counts == {"not a string": 1}


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ({}, "nowhere.txt", "nowhere.txt does not exist"),
        ({}, "*.txt", r"the pattern '.*\*.txt' matches no readable file: nothing is there"),
        ({"a.doc": b"x"}, "*", r"matches no readable file: it has .doc; known are .txt .md"),
        ({"a.doc": b"x", "b.pdf": b"x"}, "", r"has no readable file: it has .doc, .pdf; known are .txt"),
        ({"a.doc": b"x"}, "a.doc", r"a.doc is of an unknown kind; known are .txt .md .py .jsonl"),
        ({"a.txt": b""}, "a.txt", "a.txt is empty"),
        ({"a.txt": b"", "b.jsonl": b"\n"}, "", r"no text found in 2 file\(s\) .* \(documents left out: 1 empty\)"),
        ({"a.txt": b"ab\xffcd"}, "", r"a.txt is not UTF-8 at byte 2 \(0xff\); convert it, or set on-bad-utf8"),
        ({"a.txt": b"\xef\xbb\xbfa\xc3"}, "", r"a.txt is not UTF-8 at byte 4 \(0xc3\)"),
        ({"a.jsonl": b'{"text": "a"}\n{"text": "\xe9"}\n'}, "", r"a.jsonl is not UTF-8 at byte 24 \(0xe9\)"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(tmp_path, files, path, message):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        texts(tmp_path / path)
    assert "\n" not in str(error.value)


def test_no_path_is_refused():
    with pytest.raises(UserError, match="no path to read was given"):
        list_files([])


def test_bytes_that_are_not_utf8_are_replaced_and_counted_if_asked(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\xffcd")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    counts = Counter()
    assert texts(tmp_path, on_bad_utf8="replace", counts=counts) == ["ab\ufffdcd", "\ufffd"]
    assert counts == {"not UTF-8, replaced": 2}


BAD_LINES = {
    "not JSON": (b'{"text": ', "is not JSON"),
    "a number of 5000 digits": (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "is not JSON"),
    "nested too deeply": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is JSON nested too deeply"),
    "not an object": (b'["text"]', "is a JSON list, not an object"),
    "no such field": (b'{"body": "x", "title": "y"}', "has no field 'text', its fields are 'body', 'title'"),
    "not a string": (b'{"text": 3}', "has int in 'text'"),
    "lone surrogate": (rb'{"text": "ab\ud800"}', "has a lone surrogate at character 2 of 'text'"),
    "duplicate key": (b'{"text": "a", "text": "b"}', "has the key 'text' twice"),
    "NaN or Infinity": (b'{"text": "a", "score": NaN}', "has NaN, which is not JSON"),
    "too long": (b'{"text": "' + b"a" * 300_000 + b'"}', "is longer than 262144 bytes"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_refused_by_number_or_skipped_and_counted(tmp_path, monkeypatch, name):
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 262144)
    line, message = BAD_LINES[name]
    (tmp_path / "a.jsonl").write_bytes(jsonl("good") + line + b"\n" + jsonl("better"))
    with pytest.raises(UserError, match=f"a.jsonl:2 {message}.*set on-bad-line to skip"):
        texts(tmp_path)
    counts = Counter()
    assert texts(tmp_path, on_bad_line="skip", counts=counts) == ["good", "better"]
    assert counts == {name if name in counts else "not JSON": 1}


def test_a_valid_surrogate_pair_is_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(rb'{"text": "\ud83d\ude00"}')
    assert texts(tmp_path) == ["\U0001f600"]


@compressed
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_compressed_file_is_named(tmp_path, ending, damage):
    data = bytearray(COMPRESS[ending](jsonl(*(f"text {i * i}" for i in range(20_000)))))
    if damage == "cut":
        del data[-len(data) // 3 :]
    else:
        data[0] ^= 255
    (tmp_path / f"a{ending}").write_bytes(data)
    with pytest.raises(UserError, match=rf"a{ending} is damaged or cut short: \w+"):
        texts(tmp_path)


@compressed
@pytest.mark.parametrize("content", ["one line", "empty lines"])
def test_a_bomb_is_stopped_while_it_streams(tmp_path, monkeypatch, ending, content):
    monkeypatch.setattr(documents, "EXPANSION_FLOOR_BYTES", 1 << 18)
    monkeypatch.setattr(documents, "MAX_EXPANSION", 100)
    bomb = COMPRESS[ending]((b"a" if content == "one line" else b"\n") * (2 << 20))
    (tmp_path / f"a{ending}").write_bytes(bomb)
    with pytest.raises(UserError, match=rf"a{ending} unfolds to more than \d+ bytes, over 100 times its size"):
        texts(tmp_path)
    monkeypatch.setattr(documents, "MAX_EXPANSION", 1 << 20)
    with pytest.raises(UserError, match="is not JSON" if content == "one line" else "no text found"):
        texts(tmp_path)  # the same file, the cap lifted


def test_a_text_file_over_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 10)
    (tmp_path / "a.txt").write_bytes(b"a" * 10)
    assert texts(tmp_path) == ["a" * 10]
    (tmp_path / "a.txt").write_bytes(b"a" * 11)
    with pytest.raises(UserError, match="a.txt has 11 bytes as one document, the limit is 10"):
        texts(tmp_path)


def test_documents_stream(tmp_path):
    """The first document comes before the end of the file is looked at."""
    (tmp_path / "a.jsonl").write_bytes(jsonl("first") + b"\n" * 10 + b"not json")
    stream = read_documents(tmp_path)
    assert next(stream)[1] == "first"
    with pytest.raises(UserError, match="a.jsonl:12 is not JSON"):
        next(stream)


def test_real_corpora(shared_data):
    assert len(texts(shared_data / "corpora/tinyshakespeare.txt")[0]) == 1115394
    novel = next(read_documents(shared_data / "corpora/novels-en.jsonl.xz"))
    assert novel[0].endswith("novels-en.jsonl.xz:1") and novel[1].startswith("CLARA VAUGHAN\n")
