"""The third phase: the kept text, with what its steps have marked replaced, and the dropped text with its reasons."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from warploom.curate.cut import Decisions
from warploom.curate.pipeline import Pipeline
from warploom.curate.redact import apply_spans
from warploom.curate.segments import JsonlWriter, Segment, write_json

EXCERPT_CHARS = 600


def write_task(
    pipeline: Pipeline,
    segments: list[Segment],
    decisions: Decisions,
    reasons: list[str],
    wanted: set[int],
    repeats: np.ndarray,
    folder: Path,
    name: str,
) -> dict[str, Any]:
    """Write train/<name>.jsonl.zst and heldout/<name>.jsonl.zst, and dropped/<name>.jsonl.zst if it is asked for.

    wanted: rows whose beginning the report shows. repeats: (num_lines, 2), row and
    number of each line that is a repeat, ascending. Returns
    documents and bytes of each source and side, and the excerpts.
    """
    sides: dict[str, dict[str, dict[str, int]]] = {}
    excerpts: dict[str, str] = {}
    edits: dict[str, int] = {}
    with ExitStack() as stack:
        writers = {}
        for side in ("train", "heldout", *(("dropped",) if pipeline.keep_dropped else ())):
            (folder / side).mkdir(parents=True, exist_ok=True)
            writers[side] = stack.enter_context(JsonlWriter(folder / side / f"{name}.jsonl.zst"))
        for row, document, tags in _rows(segments):
            reason = reasons[decisions.reason[row]]
            text = document["text"]
            if reason:
                side = "dropped"
                document = {**document, "reason": reason, "scores": tags["scores"]}
            else:
                side = "heldout" if decisions.heldout[row] else "train"
                spans = [tuple(span) for span in tags["spans"]]
                low, high = np.searchsorted(repeats[:, 0], [row, row + 1])
                if low < high:
                    spans += _line_spans(text, set(repeats[low:high, 1].tolist()))
                text = apply_spans(text, spans) if spans else text
                cluster_size = int(decisions.cluster_size[row])
                document = {**document, "text": text, "cluster_size": cluster_size, "row": row}
            if row in wanted:
                excerpts[str(row)] = text[:EXCERPT_CHARS]
            for edit in document["edits"]:
                edits[edit] = edits.get(edit, 0) + 1
            if side in writers and (text or side == "dropped"):
                writers[side].write(document)
            count = sides.setdefault(document["source"], {}).setdefault(side, {"documents": 0, "bytes": 0})
            count["documents"] += 1
            count["bytes"] += len(text.encode("utf-8"))
    result = {"sides": sides, "excerpts": excerpts, "edits": edits}
    write_json(folder / f"{name}.done.json", result)
    return result


def _rows(segments: list[Segment]) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    for segment in segments:
        rows = range(segment.first, segment.first + segment.num_documents)
        yield from zip(rows, segment.documents(), segment.tags(), strict=True)


def _line_spans(text: str, numbers: set[int]) -> list[tuple[int, int, str]]:
    spans = []
    start = 0
    for number, line in enumerate(text.split("\n")):
        end = start + len(line) + 1
        if number in numbers:
            spans.append((start, min(end, len(text)), ""))
        start = end
    return spans


def repeated_lines(segments: list[Segment], groups: Iterator[np.ndarray], keep: int) -> np.ndarray:
    """(num_lines, 2) int64: row and number of the lines that stood in `keep` places before, ascending. groups: equal
    lines, as places over all lines of the run."""
    offsets = [np.empty(0, np.int64)]
    base = 0
    for segment in segments:
        values, starts = segment.array("lines")
        offsets.append(np.asarray(starts[:-1]) + base)
        base += len(values)
    starts_of_rows = np.concatenate(offsets)
    places = np.sort(np.concatenate([np.empty(0, np.int64), *(group[keep:] for group in groups)]))
    rows = np.searchsorted(starts_of_rows, places, side="right") - 1
    return np.stack([rows, places - starts_of_rows[rows]], axis=1) if len(rows) else np.empty((0, 2), np.int64)
