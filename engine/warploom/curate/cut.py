"""The second phase: from tags and hashes to one decision per document, without the text.

Decisions are arrays over all documents of the run, in files: the step that dropped each (or none), its reason, its
cluster of near-duplicates, its side of the split. Steps decide in their order, so a duplicate is one among the
documents that the steps before it have kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from warploom.curate.dedup import UnionFind, candidate_pairs, equal_groups
from warploom.curate.document import Step
from warploom.curate.minhash import bands, jaccard
from warploom.curate.pipeline import Pipeline
from warploom.curate.segments import Segment
from warploom.curate.words import mix

KEPT = np.uint16(0xFFFF)
NUM_SAMPLES = 20


def task_segments(folder: Path, cursors: list[dict[str, Any]]) -> list[list[Segment]]:
    """The segments of each task, with rows counted through the run."""
    tasks = []
    first = 0
    for task, cursor in enumerate(cursors):
        segments = []
        for index, count in enumerate(cursor["segments"]):
            segments.append(Segment(folder / f"{task:05d}" / f"{index:05d}", first, count))
            first += count
        tasks.append(segments)
    return tasks


@dataclass
class RuleStats:
    """What a rule did. failed: documents it does not keep, of those that were judged by it; dropped: those of them that
    no earlier rule had dropped. Samples are rows."""

    judged: int = 0
    failed: int = 0
    dropped: int = 0
    dropped_bytes: int = 0
    kept_samples: list[int] = field(default_factory=list)
    dropped_samples: list[int] = field(default_factory=list)


class Decisions:
    """Arrays over all documents, in files of one folder."""

    def __init__(self, folder: Path, size: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.size = folder, size
        self.dropped_at = self._array("dropped_at", np.uint16)  # index of the step, or KEPT
        self.reason = self._array("reason", np.uint16)  # index into reasons, 0 for none
        self.bytes = self._array("bytes", np.uint32)
        self.cluster = self._array("cluster", np.uint32)
        self.cluster_size = self._array("cluster_size", np.uint32)
        self.heldout = self._array("heldout", np.bool_)

    def _array(self, name: str, dtype: Any) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        if self.size == 0:
            return np.empty(0, dtype)
        mode = "r+" if path.exists() else "w+"
        return np.lib.format.open_memmap(path, mode, dtype, (self.size,))

    def flush(self) -> None:
        """Write the arrays to disk, before the file that says they are complete."""
        for values in (self.dropped_at, self.reason, self.bytes, self.cluster, self.cluster_size, self.heldout):
            if isinstance(values, np.memmap):
                values.flush()


def judge(pipeline: Pipeline, segments: list[Segment], decisions: Decisions) -> tuple[list[str], dict[str, RuleStats]]:
    """Apply every rule to the tags. Returns the reasons, by the numbers in decisions, and what each rule did."""
    reasons = ["", *(f"{step.name}.{rule.name}" for step in pipeline.steps for rule in step.rules)]
    rules = {reason: RuleStats() for reason in reasons[1:]}
    kept_samples: dict[str, list[tuple[int, int]]] = {reason: [] for reason in rules}
    number = {reason: index for index, reason in enumerate(reasons)}
    position = {step.name: index for index, step in enumerate(pipeline.steps)}
    for segment in segments:
        for row, tags in enumerate(segment.tags(), segment.first):
            reason = tags["dropped"]
            if reason is not None and reason not in number:  # an early step's own, such as a time limit
                number[reason] = len(reasons)
                reasons.append(reason)
                rules[reason] = RuleStats()
            key = xxhash.xxh3_64_intdigest(tags["id"].encode("utf-8", "replace"))
            for name in _failures(pipeline.steps, tags["scores"], rules, kept_samples, key, row):
                reason = reason or name
            decisions.bytes[row] = min(tags["bytes"], 0xFFFFFFFF)
            decisions.reason[row] = number[reason or ""]
            decisions.dropped_at[row] = KEPT if reason is None else position[reason.split(".")[0]]
    for name, samples in kept_samples.items():
        rules[name].kept_samples = [row for _, row in samples]
    return reasons, rules


def _failures(
    steps: Iterable[Step],
    scores: dict[str, float],
    rules: dict[str, RuleStats],
    kept_samples: dict[str, list[tuple[int, int]]],
    key: int,
    row: int,
) -> list[str]:
    """The rules that do not keep a document, in order; counts what each rule did."""
    failures = []
    for step in steps:
        for rule in step.rules:
            if rule.score in scores:
                name = f"{step.name}.{rule.name}"
                stats = rules[name]
                stats.judged += 1
                if rule.keeps(scores):
                    _sample(kept_samples[name], key, row)
                else:
                    stats.failed += 1
                    failures.append(name)
    return failures


def _sample(samples: list[tuple[int, int]], key: int, row: int) -> None:
    """Keep the lowest keys: a sample that depends on no order."""
    if len(samples) < NUM_SAMPLES or key < samples[-1][0]:
        samples.append((key, row))
        samples.sort()
        del samples[NUM_SAMPLES:]


def count_reasons(reasons: list[str], rules: dict[str, RuleStats], decisions: Decisions) -> None:
    """Complete the rules' figures by what was decided in the end."""
    counts = np.bincount(decisions.reason, minlength=len(reasons))
    sizes = np.bincount(decisions.reason, weights=decisions.bytes, minlength=len(reasons))
    for number, name in enumerate(reasons[1:], 1):
        stats = rules[name]
        stats.dropped, stats.dropped_bytes = int(counts[number]), int(sizes[number])
        rows = np.flatnonzero(decisions.reason == number)
        order = np.argsort(mix(rows.astype(np.uint64)), kind="stable")[:NUM_SAMPLES]
        stats.dropped_samples = rows[order].tolist()


def drop_exact(segments: list[Segment], step_index: int, reason: int, decisions: Decisions) -> None:
    """Of each group of documents with equal text, drop all but the first."""
    alive = decisions.dropped_at > step_index
    columns = [segment.column("exact")[:, 0] for segment in segments]
    for rows in equal_groups(columns, alive):
        decisions.dropped_at[rows[1:]] = step_index
        decisions.reason[rows[1:]] = reason


def linked_pairs(
    segments: list[Segment], alive: np.ndarray, band: int, band_hashes: int, threshold: float
) -> Iterator[tuple[int, int, float]]:
    """Yield (row, row, Jaccard similarity) of the pairs that agree in one band and are at least so similar."""
    columns = []
    for segment in segments:
        values, offsets = segment.array("minhash")
        keys = np.zeros(segment.num_documents, np.uint64)
        present = np.flatnonzero(np.diff(offsets))
        if len(present):
            rows = np.asarray(values).reshape(len(present), -1)[:, band * band_hashes : (band + 1) * band_hashes]
            keys[present] = bands(rows, 1)[0] | np.uint64(1)
        columns.append(keys)
    shingles = Shingles(segments)
    for group in equal_groups(columns, alive):
        for a, b in candidate_pairs(group):
            similarity = jaccard(shingles[a], shingles[b])
            if similarity >= threshold:
                yield a, b, similarity


class Shingles:
    """The shingles of a document by row."""

    def __init__(self, segments: list[Segment]):
        self._firsts = np.array([segment.first for segment in segments])
        self._arrays = [segment.array("shingles") for segment in segments]

    def __getitem__(self, row: int) -> np.ndarray:
        index = int(np.searchsorted(self._firsts, row, side="right")) - 1
        values, offsets = self._arrays[index]
        row -= int(self._firsts[index])
        return values[offsets[row] : offsets[row + 1]]


def drop_near(pairs: Iterable[tuple[int, int]], step_index: int, reason: int, decisions: Decisions) -> None:
    """Join linked documents to clusters and drop all but the longest of each, the first of equals."""
    union = UnionFind(decisions.folder / "parent.npy", decisions.size)
    for a, b in pairs:
        union.union(a, b)
    decisions.cluster[:] = union.roots()
    roots, inverse, counts = np.unique(decisions.cluster, return_inverse=True, return_counts=True)
    decisions.cluster_size[:] = counts[inverse]
    members = np.flatnonzero(decisions.cluster_size > 1)
    order = np.lexsort((members, -decisions.bytes[members].astype(np.int64), decisions.cluster[members]))
    ordered = members[order]
    is_first = np.diff(decisions.cluster[ordered].astype(np.int64), prepend=-1) != 0
    dropped = ordered[~is_first]
    decisions.dropped_at[dropped] = step_index
    decisions.reason[dropped] = reason
