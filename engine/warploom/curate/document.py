"""Document, Rule and Step: what flows through a pipeline, what may cut it, and the function over its stream.

A step never removes a document from the stream. It edits the text, or writes scores, labels and spans beside it; a
rule is a bound on one score, and all rules are applied afterwards, without the text. So a threshold can change without
another pass over the text, and every document that was cut is still there with its reason.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from warploom.curate.words import Words, split_words


@dataclass(slots=True)
class Document:
    """One text on its way. spans: (start, end, kind) in characters of the text, cut out or replaced when it is
    written. edits: names of the steps that changed the text. arrays: hashes that duplicates are found by. dropped: the
    reason, once a step that acts early gave one."""

    text: str
    id: str
    source: str = ""
    url: str = ""
    html: bytes | None = None  # the page, until a step has made text of it
    charset: str | None = None  # of html, as its server stated it
    scores: dict[str, float] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    spans: list[tuple[int, int, str]] = field(default_factory=list)
    edits: list[str] = field(default_factory=list)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    dropped: str | None = None
    _words: tuple[str, Words] | None = None

    @property
    def words(self) -> Words:
        """The words between white space, split once for all steps that look at the same text."""
        if self._words is None or self._words[0] is not self.text:
            self._words = (self.text, split_words(self.text, "space"))
        return self._words[1]


@dataclass(frozen=True)
class Rule:
    """Keep a document if low <= its score <= high, or if it has no such score."""

    name: str
    score: str
    low: float = -math.inf
    high: float = math.inf

    def keeps(self, scores: dict[str, float]) -> bool:
        value = scores.get(self.score)
        return value is None or self.low <= value <= self.high


def at_least(score: str, value: float) -> Any:
    """A field of a step that is the lower bound of one of its scores; -inf switches the rule off."""
    return field(default=value, metadata={"score": score, "bound": "low"})


def at_most(score: str, value: float) -> Any:
    """A field of a step that is the upper bound of one of its scores; inf switches the rule off."""
    return field(default=value, metadata={"score": score, "bound": "high"})


@dataclass
class StepStats:
    """What a step did, added up over tasks."""

    documents: int = 0
    bytes: int = 0
    seconds: float = 0.0  # CPU time of this step alone
    counts: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "counts": dict(sorted(self.counts.items()))}

    def add(self, other: dict[str, Any]) -> None:
        self.documents += other["documents"]
        self.bytes += other["bytes"]
        self.seconds += other["seconds"]
        self.counts.update(other["counts"])


@dataclass(kw_only=True)
class Step:
    """A function over a stream of documents. A subclass is a dataclass whose fields are its settings, with `apply` for
    one document or `__call__` for the stream; its bounds are fields made by at_least and at_most."""

    kind: ClassVar[Literal["edit", "score", "span", "dedup"]] = "score"
    NAME: ClassVar[str] = ""  # as a pipeline file calls it

    name: str = ""
    """Name in reports and reasons; that of the step by default."""
    early: bool = False
    """Spare later steps a document that fails a rule here. Its thresholds then cannot change without a new pass."""

    def __post_init__(self) -> None:
        self.name = self.name or self.NAME
        self.stats = StepStats()
        self.rules = tuple(self._rules())

    def apply(self, document: Document) -> None:
        raise NotImplementedError

    def __call__(self, documents: Iterable[Document]) -> Iterator[Document]:
        stats = self.stats
        for document in documents:
            if document.dropped is None:
                started = time.thread_time()
                self.apply(document)
                stats.seconds += time.thread_time() - started
                stats.documents += 1
                stats.bytes += len(document.text) if document.html is None else len(document.html)
                if self.early and document.dropped is None:
                    document.dropped = self.first_failure(document.scores)
            yield document

    def first_failure(self, scores: dict[str, float]) -> str | None:
        """The reason "step.rule" of the first rule that does not keep such a document."""
        for rule in self.rules:
            if not rule.keeps(scores):
                return f"{self.name}.{rule.name}"
        return None

    def settings(self) -> dict[str, Any]:
        """Every constant of the step, as JSON values."""
        values = {item.name: _plain(getattr(self, item.name)) for item in dataclasses.fields(self)}
        return {"use": self.NAME, **values}

    def files(self) -> list[Path]:
        """Files that the step reads besides its documents: it is a step anew when they change."""
        return []

    def tag_settings(self) -> dict[str, Any]:
        """The settings that decide what apply writes: all but the bounds, unless they act early."""
        bounds = {item.name for item in dataclasses.fields(self) if "bound" in item.metadata}
        return {name: value for name, value in self.settings().items() if self.early or name not in bounds}

    def _rules(self) -> Iterator[Rule]:
        for item in dataclasses.fields(self):
            if "bound" in item.metadata:
                value = getattr(self, item.name)
                if not math.isinf(value):
                    score = f"{self.name}.{item.metadata['score']}"
                    yield Rule(item.name, score, **{item.metadata["bound"]: value})

    def put(self, document: Document, scores: Mapping[str, float]) -> None:
        """Write scores beside the document, under this step's name."""
        for name, value in scores.items():
            document.scores[f"{self.name}.{name}"] = round(float(value), 6)

    def change(self, document: Document, text: str) -> None:
        """Replace the text, noting the edit if it is one."""
        if text != document.text:
            document.text = text
            document.edits.append(self.name)
            self.stats.counts["changed"] += 1


def _plain(value: Any) -> Any:
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
