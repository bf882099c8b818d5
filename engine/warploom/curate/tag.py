"""The first phase: read a task's files, run all steps over their documents, and write the segments.

A segment is a fixed amount of input, committed with the place where the next one begins. So a run that was killed goes
on inside the file, and writes the same bytes that it would have written in one go.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from warploom.curate.document import Document, Step
from warploom.curate.pipeline import Pipeline
from warploom.curate.records import Record, read_records
from warploom.curate.segments import read_json, write_json, write_segment

SEGMENT_BYTES = 32 << 20  # of input, as unfolded
STRIPE_RECORDS = 256  # in a row that one task takes of a file that several share


def tag(pipeline: Pipeline, task: dict[str, Any], folder: Path) -> None:
    """Run the steps of a pipeline over a task's files, into segments in folder; goes on where it was stopped.

    task: {"source": name, "files": [path, ...], "stripe": i, "stripes": n}, of each file every n-th block of records
    from block i on. The folder's cursor.json says what was done, and when it is complete.
    """
    cursor_file = folder / "cursor.json"
    folder.mkdir(parents=True, exist_ok=True)
    if cursor_file.exists():
        cursor = read_json(cursor_file)
    else:
        cursor = {"file": 0, "record": 0, "segments": [], "steps": {}, "problems": {}, "damaged": [], "input_bytes": 0}
    text_column = next(source.text_column for source in pipeline.sources if source.name == task["source"])
    while not cursor.get("done"):
        reading = _Reading(task, cursor, text_column)
        for step in pipeline.steps:
            step.stats = type(step.stats)()
        stem = folder / f"{len(cursor['segments']):05d}"
        count = write_segment(stem, run_steps(pipeline.steps, reading.documents()))
        cursor = reading.cursor(count, pipeline.steps)
        write_json(cursor_file, cursor)


def run_steps(steps: Iterable[Step], documents: Iterable[Document]) -> Iterator[Document]:
    """Chain the steps over a stream of documents."""
    stream = iter(documents)
    for step in steps:
        stream = iter(step(stream))
    return stream


class _Reading:
    """The documents of one segment, and the place behind them."""

    def __init__(self, task: dict[str, Any], cursor: dict[str, Any], text_column: str):
        self._task, self._old, self._text_column = task, cursor, text_column
        self._file, self._record = cursor["file"], cursor["record"]
        self._problems: Counter[str] = Counter(cursor["problems"])
        self._damaged: list[str] = list(cursor["damaged"])
        self._bytes = 0
        self._done = False

    def documents(self) -> Iterator[Document]:
        files = self._task["files"]
        while self._file < len(files):
            path = files[self._file]
            for record in read_records(path, self._record, self._text_column):
                self._record = record.number
                if (record.number - 1) // STRIPE_RECORDS % self._task["stripes"] != self._task["stripe"]:
                    continue
                document = self._document(record, path)
                if document is not None:
                    yield document
                if self._bytes >= SEGMENT_BYTES:
                    return
            self._file += 1
            self._record = 0
        self._done = True

    def _document(self, record: Record, path: str) -> Document | None:
        if record.problem is not None:
            if record.breaks_file:
                self._damaged.append(record.problem)
                self._problems["damaged file"] += 1
            else:
                self._problems[record.problem] += 1
            return None
        content = record.text if record.html is None else record.html
        if not content:
            self._problems["empty"] += 1
            return None
        self._bytes += len(content)
        return Document(
            text=clean_surrogates(record.text or ""),
            id=f"{os.fspath(path)}:{record.number}",
            source=self._task["source"],
            url=record.url,
            html=record.html,
            charset=record.charset,
        )

    def cursor(self, num_documents: int, steps: Iterable[Step]) -> dict[str, Any]:
        stats = {}
        for step in steps:
            if step.name in self._old["steps"]:
                step.stats.add(self._old["steps"][step.name])
            stats[step.name] = step.stats.to_json()
        return {
            "file": self._file,
            "record": self._record,
            "segments": [*self._old["segments"], num_documents],
            "steps": stats,
            "problems": dict(self._problems),
            "damaged": self._damaged,
            "input_bytes": self._old["input_bytes"] + self._bytes,
            "done": self._done,
        }


def clean_surrogates(text: str) -> str:
    """Text that UTF-8 can hold: a lone surrogate becomes a question mark."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
