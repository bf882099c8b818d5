"""How right curation is: redaction on labelled sentences, near-duplicates against exact Jaccard. No timing here."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bench.curate import documents
from bench.harness import print_table
from warploom.curate.dedup import NearDedup
from warploom.curate.minhash import bands, jaccard, shingles, signature
from warploom.curate.redact import find

_SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
_SENTENCES = Path(__file__).resolve().parents[1] / "tests" / "curate" / "redaction"
# The labels of the Presidio sentences that have a kind here.
LABELS = {
    "EMAIL_ADDRESS": "email",
    "PHONE_NUMBER": "phone",
    "IP_ADDRESS": "ip",
    "CREDIT_CARD": "card",
    "IBAN_CODE": "iban",
    "US_SSN": "ssn",
}
THRESHOLD = NearDedup.jaccard

Span = tuple[int, int, str]  # start, end, kind


def presidio_sentences() -> list[tuple[str, list[Span]]]:
    """(text, labels) of the 1,500 sentences of the Presidio research set, in ../shared/data."""
    with gzip.open(_SHARED / "web" / "presidio_synth_dataset_v2.json.gz") as file:
        sentences = json.load(file)
    return [
        (
            sentence["full_text"],
            [
                (span["start_position"], span["end_position"], LABELS[span["entity_type"]])
                for span in sentence["spans"]
                if span["entity_type"] in LABELS
            ],
        )
        for sentence in sentences
    ]


def marked_sentences(name: str) -> list[tuple[str, list[Span]]]:
    """(text, labels) of tests/curate/redaction/<name>.txt: a sentence a line, with [[kind:value]] around what is to be
    found. A bar in a value is left out: it keeps scanners of secrets from taking the file for a leak."""
    sentences = []
    for line in (_SENTENCES / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        text, labels, done = "", [], 0
        for mark in re.finditer(r"\[\[([a-z]+):(.*?)\]\]", line):
            text += line[done : mark.start()]
            value = mark[2].replace("|", "")
            labels.append((len(text), len(text) + len(value), mark[1]))
            text += value
            done = mark.end()
        sentences.append((text + line[done:], labels))
    return sentences


def score_redaction(sentences: Iterable[tuple[str, list[Span]]], private_addresses: bool) -> dict[str, dict[str, int]]:
    """By kind: labelled, recalled, found, right; a find counts if it overlaps a label of its kind."""
    counts: dict[str, Counter[str]] = {}
    for text, labels in sentences:
        got = list(find(text, private_addresses))
        for spans, others, number, hits in ((labels, got, "labelled", "recalled"), (got, labels, "found", "right")):
            for start, end, kind in spans:
                count = counts.setdefault(kind, Counter(labelled=0, recalled=0, found=0, right=0))
                count[number] += 1
                count[hits] += any(kind == k and start < b and a < end for a, b, k in others)
    return {kind: dict(count) for kind, count in counts.items()}


def redaction() -> list[dict[str, Any]]:
    """Precision and recall per kind and set of sentences; that of ../shared/data only where it is."""
    sets = {name: score_redaction(marked_sentences(name), False) for name in ("unseen", "mended_with")}
    if _SHARED.is_dir():
        sets["presidio"] = score_redaction(presidio_sentences(), True)
    return [
        {
            "bench": "data",
            "config": f"redaction, {name}",
            "subject": kind,
            "labelled": count["labelled"],
            "precision": count["right"] / max(count["found"], 1),
            "recall": count["recalled"] / count["labelled"],
        }
        for name, counts in sets.items()
        for kind, count in sorted(counts.items())
        if count["labelled"]
    ]


def near_duplicates(num_pairs: int = 1500) -> list[dict[str, Any]]:
    """Pairs of a text and the same with words replaced, by their exact Jaccard similarity: how many agree in a band of
    14 x 8, and how many of them exact Jaccard then links."""
    rng = random.Random(0)
    texts = documents(12)[:num_pairs]
    words = [word for text in texts[:50] for word in text.split()]
    rows = []
    for text in texts:
        changed = text.split()
        for _ in range(rng.randrange(len(changed) // 20 + 1)):
            changed[rng.randrange(len(changed))] = rng.choice(words)
        a, b = shingles(text), shingles(" ".join(changed))
        keys = bands(np.stack([signature(a), signature(b)]), 14)
        rows.append((jaccard(a, b), bool((keys[:, 0] == keys[:, 1]).any())))
    records = []
    for low, high in ((0.0, 0.6), (0.6, 0.7), (0.7, 0.8), (0.8, 0.85), (0.85, 0.9), (0.9, 1.01), (0.8, 1.01)):
        inside = [(similarity, candidate) for similarity, candidate in rows if low <= similarity < high]
        met = [candidate for _, candidate in inside]
        linked = [candidate and similarity >= THRESHOLD for similarity, candidate in inside]
        records.append(
            {
                "bench": "data",
                "config": "near-duplicates",
                "subject": f"{low:g} to {min(high, 1):g}",
                "pairs": len(met),
                "in a band": sum(met) / max(len(met), 1),
                "linked": sum(linked) / max(len(linked), 1),
            }
        )
    return records


def accuracy() -> list[dict[str, Any]]:
    """Print both tables and return their records."""
    redacted = redaction()
    print_table(
        "redaction on labelled sentences",
        ("sentences", "kind", "labelled", "precision", "recall"),
        [
            (
                r["config"].removeprefix("redaction, "),
                r["subject"],
                str(r["labelled"]),
                f"{r['precision']:.3f}",
                f"{r['recall']:.3f}",
            )
            for r in redacted
        ],
    )
    pairs = near_duplicates()
    print_table(
        f"near-duplicates, threshold {THRESHOLD}",
        ("exact Jaccard", "pairs", "agree in a band", "linked"),
        [(r["subject"], str(r["pairs"]), f"{r['in a band']:.3f}", f"{r['linked']:.3f}") for r in pairs],
    )
    return [*redacted, *pairs]
