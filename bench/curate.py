"""Curation beside datatrove on the same text, in MB of text per second of one core, and memory at two corpus sizes.

The peer has an interpreter of its own, since it cannot be installed beside this engine's pinned packages:

    python -m venv peer && peer/bin/pip install 'datatrove[processing]==0.10.1' spacy

Without one its column is empty. CPU seconds are counted, so that a busy machine changes little.
"""

from __future__ import annotations

import gzip
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from bench.harness import print_table
from warploom.curate.document import Document
from warploom.curate.encode import encode_task
from warploom.curate.records import read_records
from warploom.curate.segments import JsonlWriter
from warploom.curate.steps import build_steps
from warploom.curate.tag import run_steps
from warploom.curate.workers import run_pipeline
from warploom.data.documents import read_documents
from warploom.data.stdlib import stdlib_paths
from warploom.data.tokenizer import Tokenizer

_SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
DOCUMENT_CHARS = 7000
ROUNDS = 3
PEER = "datatrove"


def documents(megabytes: float) -> list[str]:
    """English prose if ../shared/data is there, else the standard library, cut to the size of web pages."""
    novels = _SHARED / "corpora" / "novels-en.jsonl.xz"
    texts: list[str] = []
    size = 0.0
    for _, text in read_documents(novels if novels.exists() else stdlib_paths()):
        for start in range(0, len(text), DOCUMENT_CHARS):
            texts.append(text[start : start + DOCUMENT_CHARS])
            size += len(texts[-1].encode())
            if size >= megabytes * 1e6:
                return texts
    return texts


def cpu_s(call: Callable[[], object]) -> float:
    """Median CPU seconds of all threads of this process, over ROUNDS calls."""
    samples = []
    for _ in range(ROUNDS):
        started = time.process_time()
        call()
        samples.append(time.process_time() - started)
    return statistics.median(samples)


def run_through(uses: Iterable[dict[str, Any]], texts: list[str]) -> Callable[[], None]:
    steps = build_steps(uses)

    def call() -> None:
        for _ in run_steps(steps, (Document(text=text, id=str(i)) for i, text in enumerate(texts))):
            pass

    call()  # tables and models are loaded once
    return call


FILTER_CHAIN = (
    {"use": "gopher_repetition"},
    {"use": "gopher_quality"},
    {"use": "c4", "terminal_punctuation": False},
    {"use": "fineweb"},
)


def peer_seconds(interpreter: Path | None, texts: list[str]) -> dict[str, float]:
    """CPU seconds of datatrove by stage (bench/curate_peer.py); none without an interpreter that has it."""
    if interpreter is None:
        return {}
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(texts, file)
        file.flush()
        script = Path(__file__).with_name("curate_peer.py")
        command = [str(interpreter), "-I", str(script), file.name, str(ROUNDS)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{PEER} failed under {interpreter}:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{PEER} {found['version']}")
    seconds: dict[str, float] = found["seconds"]
    return seconds


def write_archive(path: Path, megabytes: float) -> float:
    """A .warc.gz of real pages, repeated to the size; returns its MB of HTML."""
    sample = (_SHARED / "web" / "dolma-sample-0001.warc.gz").read_bytes()
    html = 0.929
    repeats = max(1, round(megabytes / html))
    path.write_bytes(sample * repeats)
    return html * repeats


def write_wet(path: Path, texts: list[str]) -> None:
    """A .wet.gz as Common Crawl writes it: one gzip member per record."""
    with open(path, "wb") as file:
        for i, text in enumerate(texts):
            body = text.encode()
            head = (
                f"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Target-URI: http://site{i % 97}.example/{i}\r\n"
                f"WARC-Record-ID: <urn:uuid:{i:032x}>\r\nContent-Type: text/plain\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            file.write(gzip.compress(head.encode() + body + b"\r\n\r\n", 1, mtime=0))


def pipeline(source: Path, steps: str, rest: str = "") -> str:
    return f'[[source]]\nname = "bench"\npaths = ["{source}"]\n{steps}\n{rest}'


def bench_curation(megabytes: float, peer_interpreter: Path | None = None) -> list[dict[str, Any]]:
    texts = documents(megabytes)
    size = sum(len(text.encode()) for text in texts) / 1e6
    peer = peer_seconds(peer_interpreter, texts)
    records: list[dict[str, Any]] = []

    def add(name: str, target: float, rate: float) -> None:
        record = {"bench": "data", "config": name, "subject": "warploom", "mb_per_core_s": rate, "target": target}
        records.append({**record, PEER: size / peer[name] if name in peer else None})

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        add("filter chain", 8, size / cpu_s(run_through(FILTER_CHAIN, texts)))
        add("minhash signatures", 8, size / cpu_s(run_through([{"use": "near_dedup"}], texts)))
        add("redaction scan", 50, size / cpu_s(run_through([{"use": "redact"}], texts)))
        if _SHARED.is_dir():
            add("WARC to text (MB of HTML)", 15, _bench_archive(folder, megabytes))
        rate, ratio = _bench_shards(folder, texts, size)
        add("WET to packed shards", 1.5, rate)
        add("tokenization / tokenizers alone", 0.9, ratio)
    return records


def _bench_archive(folder: Path, megabytes: float) -> float:
    archive = folder / "pages.warc.gz"
    html = write_archive(archive, megabytes)
    steps = build_steps([{"use": "extract"}])

    def call() -> None:
        pages = (
            Document(text="", id=str(record.number), html=record.html, charset=record.charset)
            for record in read_records(str(archive))
            if record.html
        )
        for _ in run_steps(steps, pages):
            pass

    return html / cpu_s(call)


def _bench_shards(folder: Path, texts: list[str], size: float) -> tuple[float, float]:
    """(MB per core-second from WET to shards, speed of our encoding over that of the library on a list in memory)."""
    wet = folder / "texts.wet.gz"
    write_wet(wet, texts)
    tokenizer = Tokenizer.train(texts, 8192)
    tokenizer.save(folder / "tokenizer.json")
    file = folder / "pipeline.toml"
    steps = '[[step]]\npreset = "gopher"\n[[step]]\nuse = "near_dedup"\n[[step]]\nuse = "redact"'
    file.write_text(pipeline(wet, steps, f'[tokens]\ntokenizer = "{folder / "tokenizer.json"}"'), encoding="utf-8")
    count = 0

    def whole() -> None:
        nonlocal count
        count += 1
        run_pipeline(file, folder / f"run{count}", "inline")

    rate = size / cpu_s(whole)
    for side, rows in (("train", texts), ("heldout", [])):
        (folder / "cut" / "write" / side).mkdir(parents=True)
        with JsonlWriter(folder / "cut" / "write" / side / "00000.jsonl.zst") as writer:
            for row, text in enumerate(rows):
                writer.write({"text": text, "row": row, "cluster_size": 1})
    (folder / "cut" / "learn").mkdir()
    tokenizer.save(folder / "cut" / "learn" / "tokenizer.json")
    # A fresh one each time, as the task has: the library remembers words it has met.
    alone = cpu_s(lambda: Tokenizer.load(folder / "tokenizer.json").encode_batch(texts))
    ours = cpu_s(lambda: encode_task(folder / "cut", "00000"))
    return rate, alone / ours


# Private memory is sampled: the kernel keeps no peak of it. What it keeps, the resident peak, counts pages of mapped
# files too, which it takes back when it needs room. (getrusage would give the peak of whoever started the process.)
_MEMORY_CHILD = """
import re, sys, threading
from pathlib import Path
from warploom.curate.workers import run_pipeline

def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

private, done = [0], threading.Event()
def sample():
    while not done.wait(0.01):
        private[0] = max(private[0], kilobytes("RssAnon"))

sampler = threading.Thread(target=sample)
sampler.start()
run_pipeline(Path(sys.argv[1]), Path(sys.argv[2]), "inline")
done.set()
sampler.join()
print(private[0] // 1024, kilobytes("VmHWM") // 1024)
"""


def bench_memory(megabytes: float, factors: tuple[int, ...] = (1, 4)) -> list[dict[str, Any]]:
    """Peak memory of whole runs, in a process of their own, on two corpora of which one is four times the other."""
    records = []
    for factor in factors:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            source = folder / "texts.jsonl"
            size = 0
            with open(source, "w", encoding="utf-8") as file:
                for i, text in enumerate(_distinct(documents(megabytes), factor)):
                    size += len(text.encode())
                    file.write(json.dumps({"text": text, "url": f"http://site{i % 997}.example/{i}"}) + "\n")
            steps = '[[step]]\npreset = "gopher"\n[[step]]\nuse = "near_dedup"\n[[step]]\nuse = "redact"'
            pipeline_file = folder / "pipeline.toml"
            pipeline_file.write_text(pipeline(source, steps, "[tokens]\nvocab_size = 1024"), encoding="utf-8")
            done = subprocess.run(
                [sys.executable, "-c", _MEMORY_CHILD, str(pipeline_file), str(folder / "run")],
                capture_output=True,
                text=True,
                check=True,
            )
            records.append(
                {
                    "bench": "data",
                    "config": f"{size / 1e6:.0f} MB of text",
                    "subject": "peak memory",
                    "private_mb": int(done.stdout.split()[0]),
                    "resident_mb": int(done.stdout.split()[1]),
                }
            )
    return records


def _distinct(texts: list[str], factor: int) -> Iterator[str]:
    """The texts `factor` times, each time with its words in another order, so that no copy is a duplicate."""
    for copy in range(factor):
        for text in texts:
            words = text.split(" ")
            yield " ".join(words[i] for i in sorted(range(len(words)), key=lambda i: (i * (2 * copy + 1)) % 7919))


def print_curation(records: list[dict[str, Any]], memory: list[dict[str, Any]]) -> None:
    if not any(record[PEER] for record in records):
        print(f"no interpreter with {PEER} was named (--datatrove-python): its column is empty")
    print_table(
        f"curation, MB per core-second (median of {ROUNDS}; the last row is a ratio)",
        ("stage", "warploom", "at least", PEER, "times"),
        [
            (
                record["config"],
                f"{record['mb_per_core_s']:.2f}",
                f"{record['target']:g}",
                f"{record[PEER]:.2f}" if record[PEER] else "",
                f"{record['mb_per_core_s'] / record[PEER]:.1f}" if record[PEER] else "",
            )
            for record in records
        ],
    )
    print_table(
        "peak memory of a whole run",
        ("corpus", "private MB", "with mapped files"),
        [(r["config"], str(r["private_mb"]), str(r["resident_mb"])) for r in memory],
    )
