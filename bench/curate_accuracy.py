"""How right curation is: redaction on labelled sentences, near-duplicates against exact Jaccard. No timing here."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from bench.curate import documents
from bench.harness import print_table
from warploom.curate.dedup import NearDedup
from warploom.curate.minhash import bands, jaccard, shingles, signature
from warploom.curate.redact import find

_SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
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


def redaction() -> list[dict[str, Any]]:
    """Precision and recall per kind; a find counts if it overlaps a label of its kind."""
    with gzip.open(_SHARED / "web" / "presidio_synth_dataset_v2.json.gz") as file:
        sentences = json.load(file)
    labelled, recalled, found, right = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for sentence in sentences:
        gold = [
            (span["start_position"], span["end_position"], LABELS[span["entity_type"]])
            for span in sentence["spans"]
            if span["entity_type"] in LABELS
        ]
        got = list(find(sentence["full_text"], private_addresses=True))
        for spans, others, counts, hits in ((gold, got, labelled, recalled), (got, gold, found, right)):
            for start, end, kind in spans:
                counts[kind] += 1
                hits[kind] += any(kind == k and start < b and a < end for a, b, k in others)
    return [
        {
            "bench": "data",
            "config": "redaction",
            "subject": kind,
            "labelled": labelled[kind],
            "precision": right[kind] / max(found[kind], 1),
            "recall": recalled[kind] / labelled[kind],
        }
        for kind in LABELS.values()
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
    """Print both tables and return their records; the first only where ../shared/data is."""
    records = []
    if _SHARED.is_dir():
        redacted = redaction()
        print_table(
            "redaction on 1,500 labelled sentences",
            ("kind", "labelled", "precision", "recall"),
            [(r["subject"], str(r["labelled"]), f"{r['precision']:.3f}", f"{r['recall']:.3f}") for r in redacted],
        )
        records += redacted
    pairs = near_duplicates()
    print_table(
        f"near-duplicates, threshold {THRESHOLD}",
        ("exact Jaccard", "pairs", "agree in a band", "linked"),
        [(r["subject"], str(r["pairs"]), f"{r['in a band']:.3f}", f"{r['linked']:.3f}") for r in pairs],
    )
    return [*records, *pairs]
