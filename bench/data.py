"""python -m bench.data: what the data costs. The loader per batch, as a share of a training step; tokenizing per MB;
curation per MB, beside datatrove where there is an interpreter with it.

The text of the first two is the Python standard library, so the figures can be had anywhere.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from bench.curate import bench_curation, bench_memory, print_curation
from bench.curate_accuracy import accuracy
from bench.harness import interleave, print_fingerprint, print_table, write_records
from bench.step import CASES, DTYPES, build_step
from warploom.data.dataset import TokenDataset, TokenSplit
from warploom.data.documents import read_documents
from warploom.data.loader import Loader
from warploom.data.shards import tokenize_corpus
from warploom.data.stdlib import stdlib_paths
from warploom.data.tokenizer import Tokenizer

SHAPES = ((16, 256), (16, 1024), (64, 1024))  # (B, T); the first is that of the `small` step
HOSTILE = {"a": "a", "caret": "^", "space": " ", "line end": "\n", "ab": "ab"}


def random_crops(split: TokenSplit, B: int, T: int) -> Callable[[], object]:
    """The least a loader can do, as nanoGPT does it: crops at random places, documents not kept apart."""
    tokens = split.read(np.array([0]), split.num_tokens)[0].astype(np.uint16)

    def crops() -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.randint(len(tokens) - T, (B,))
        return tuple(
            torch.stack([torch.from_numpy(tokens[s + shift : s + shift + T].astype(np.int64)) for s in starts])
            for shift in (0, 1)
        )

    return crops


def bench_loader(dataset: TokenDataset, budget_s: float) -> list[dict[str, Any]]:
    records = []
    step = build_step("warploom", CASES["small"], DTYPES["fp32"])
    for B, T in SHAPES:
        common = {"seq_len": T, "micro_batch_size": B, "seed": 0}
        subjects: dict[str, Callable[[], object]] = {
            "warploom": Loader(dataset.train, **common).__next__,
            "warploom, documents together": Loader(dataset.train, separate_documents=False, **common).__next__,
            "random crops": random_crops(dataset.train, B, T),
        }
        if (B, T) == SHAPES[0]:
            subjects["training step"] = lambda: step()
        timings = interleave(subjects, budget_s=budget_s)
        for subject, timing in timings.items():
            record = {
                "bench": "data",
                "config": f"{B} x {T}",
                "subject": subject,
                "us_per_batch": timing.median_s * 1e6,
                "tokens_per_s": B * T / timing.median_s,
                "spread": timing.spread,
            }
            if "training step" in timings:
                record["share_of_step"] = timing.median_s / timings["training step"].median_s
            records.append(record)
    return records


def bench_tokenizing(tokenizer: Tokenizer, texts: list[str], budget_s: float) -> list[dict[str, Any]]:
    """Seconds per MB of UTF-8 text."""
    cores = os.cpu_count() or 1

    def in_threads() -> None:
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(tokenizer.encode_array, texts))

    subjects: dict[str, Callable[[], object]] = {
        "encode, 1 thread": lambda: [tokenizer.encode_array(text) for text in texts],
        f"encode, {cores} threads": in_threads,
        "encode, library's own batch": lambda: tokenizer.encode_batch(texts),
        "train, 8192 tokens": lambda: Tokenizer.train(texts, 8192),
    }
    timings = interleave(subjects, budget_s=budget_s, warmup_s=0.0, min_rounds=3)
    num_bytes = sum(len(text.encode()) for text in texts)
    records = [
        {"bench": "data", "config": "code", "subject": subject, "s_per_mb": timing.median_s / num_bytes * 1e6}
        for subject, timing in timings.items()
    ]
    for name, unit in HOSTILE.items():
        for megabytes in (1, 2):
            text = unit * (megabytes * 10**6 // len(unit))
            started = time.perf_counter()
            tokenizer.encode_array(text)
            seconds = (time.perf_counter() - started) / megabytes
            records.append(
                {
                    "bench": "data",
                    "config": f"{name!r}, {megabytes} MB",
                    "subject": "encode, 1 thread",
                    "s_per_mb": seconds,
                }
            )
    return records


@dataclass(frozen=True)
class Arguments:
    """Time the loader, the tokenizer and curation."""

    parts: tuple[Literal["loader", "tokenizer", "curation", "accuracy"], ...] = (
        "loader",
        "tokenizer",
        "curation",
        "accuracy",
    )
    """What to time; accuracy: redaction and near-duplicates against labels and exact Jaccard."""
    megabytes: float = 4.0
    """Text that curation is timed on."""
    memory_megabytes: float = 8.0
    """Text that the memory of a whole run of curation is measured on, and then on four times as much."""
    datatrove_python: Path | None = None
    """An interpreter that has datatrove, to run beside curation (bench/curate.py says how to make one)."""
    budget_s: float = 10.0
    """Seconds of timing per table row group."""
    json: Path | None = None
    """Write the records there as JSON."""


def main(arguments: Arguments) -> None:
    print_fingerprint()
    records: list[dict[str, Any]] = []
    if "loader" in arguments.parts or "tokenizer" in arguments.parts:
        records += loader_and_tokenizer(arguments)
    if "curation" in arguments.parts:
        curation = bench_curation(arguments.megabytes, arguments.datatrove_python)
        memory = bench_memory(arguments.memory_megabytes)
        print_curation(curation, memory)
        records += [*curation, *memory]
    if "accuracy" in arguments.parts:
        records += accuracy()
    write_records(arguments.json, records)


def loader_and_tokenizer(arguments: Arguments) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        dataset = tokenize_corpus(stdlib_paths(), Path(folder) / "tokens")
        seconds = time.perf_counter() - started
        megabytes = (dataset.train.num_bytes + dataset.heldout.num_bytes) / 1e6
        print(f"standard library to token shards: {megabytes:.1f} MB in {seconds:.1f} s, vocabulary 8192, from nothing")
        loader = bench_loader(dataset, arguments.budget_s) if "loader" in arguments.parts else []
        tokenizing = []
        if "tokenizer" in arguments.parts:
            texts = [text for _, text in read_documents(stdlib_paths())][::4]
            tokenizing = bench_tokenizing(dataset.tokenizer, texts, arguments.budget_s)
    print_table(
        "loader (share: of the `small` training step of this run)",
        ("batch", "subject", "us/batch", "tokens/s", "spread", "share"),
        [
            (
                record["config"],
                record["subject"],
                f"{record['us_per_batch']:,.0f}",
                f"{record['tokens_per_s']:,.0f}",
                f"{record['spread']:.0%}",
                f"{record['share_of_step']:.3%}" if "share_of_step" in record else "",
            )
            for record in loader
        ],
    )
    print_table(
        "tokenizer",
        ("text", "subject", "s/MB"),
        [(record["config"], record["subject"], f"{record['s_per_mb']:.3f}") for record in tokenizing],
    )
    total = {
        "bench": "data",
        "config": "standard library",
        "subject": "tokenize_corpus",
        "s_per_mb": seconds / megabytes,
    }
    return [total, *loader, *tokenizing]


if __name__ == "__main__":
    main(tyro.cli(Arguments))
