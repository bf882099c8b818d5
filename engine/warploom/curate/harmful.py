"""Harmful speech by word list, and bias as measured counts.

A word list alone deletes dialect and the speech of those it was meant to protect, so it gives a score with a bound that
is off unless it is set; and what any filter does to the mentions of groups of people is counted before and after.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from warploom.curate.document import Document, Step, at_most
from warploom.curate.segments import Segment
from warploom.curate.wording import word_scanner
from warploom.errors import UserError


@dataclass(kw_only=True)
class Harmful(Step):
    """Count the terms of a word list. C4 dropped every page with one: max_terms = 0."""

    NAME = "harmful"

    words: str = ""
    """A text file with a term per line, such as the LDNOOBW list."""
    max_terms: float = at_most("terms", float("inf"))
    """Terms in a document."""
    max_density: float = at_most("density", float("inf"))
    """Terms per thousand words."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.words:
            raise UserError("the step harmful needs words = a file with a term per line")
        try:
            lines = Path(self.words).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UserError(f"cannot read the word list {self.words}: {error.strerror}") from error
        terms = sorted({line.strip().lower() for line in lines if re.search(r"\w", line)})
        if not terms:
            raise UserError(f"the word list {self.words} has no term")
        self._scanner = word_scanner(terms)

    def files(self) -> list[Path]:
        return [Path(self.words)]

    def apply(self, document: Document) -> None:
        data = document.text.encode("utf-8")
        count = sum(1 for _ in self._scanner.finditer(data))
        words = max(len(data.split()), 1) if count else 1
        self.stats.counts["terms"] += count
        self.put(document, {"terms": count, "density": 1000 * count / words})


GROUPS: dict[str, tuple[str, ...]] = {
    "women": ("woman", "women", "girl", "girls", "she", "her", "female", "females", "mother", "wife", "daughter"),
    "men": ("man", "men", "boy", "boys", "he", "him", "male", "males", "father", "husband", "son"),
    "gay": ("gay", "gays", "lesbian", "lesbians", "bisexual", "homosexual", "homosexuals", "queer"),
    "trans": ("transgender", "transsexual", "trans woman", "trans man", "nonbinary", "non-binary"),
    "black": ("african american", "african americans", "black people", "black man", "black woman", "black men"),
    "white": ("white people", "white man", "white woman", "white men", "caucasian", "caucasians"),
    "asian": ("asian", "asians", "chinese", "japanese", "korean", "koreans", "indian", "indians"),
    "latino": ("latino", "latinos", "latina", "latinas", "hispanic", "hispanics", "mexican", "mexicans"),
    "muslim": ("muslim", "muslims", "islam", "islamic"),
    "jewish": ("jew", "jews", "jewish", "judaism"),
    "christian": ("christian", "christians", "christianity", "catholic", "catholics"),
    "disabled": ("disabled", "disability", "disabilities", "deaf", "blind people", "wheelchair"),
    "old": ("elderly", "old people", "senior citizens"),
    "immigrant": ("immigrant", "immigrants", "refugee", "refugees", "migrant", "migrants"),
}


@dataclass(kw_only=True)
class Bias(Step):
    """Count in how many documents each group of people is mentioned. It drops nothing: the report sets the counts
    before the cut beside those after it, and beside how often a harmful term stands in the same document."""

    NAME = "bias"

    groups: tuple[str, ...] = tuple(GROUPS)

    def __post_init__(self) -> None:
        super().__post_init__()
        for group in self.groups:
            if group not in GROUPS:
                raise UserError(f"bias.groups has {group!r}; known: {', '.join(GROUPS)}")
        self._group_of = {term: group for group in self.groups for term in GROUPS[group]}
        self._scanner = word_scanner(self._group_of)

    def apply(self, document: Document) -> None:
        found: dict[str, float] = {}
        for match in self._scanner.finditer(document.text.encode("utf-8")):
            group = self._group_of[match[0].decode("utf-8").lower()]
            found[group] = found.get(group, 0) + 1
        self.put(document, found)


def bias_table(
    steps: Iterable[Step], segments: list[Segment], kept: np.ndarray
) -> dict[str, dict[str, dict[str, int]]]:
    """By source and group: documents that mention it, before and after the cut, and those of them with a harmful term,
    if a step `harmful` counted such; {} without a step `bias`."""
    by_kind = {step.NAME: step.name for step in steps}
    if Bias.NAME not in by_kind:
        return {}
    prefix, harmful = by_kind[Bias.NAME] + ".", by_kind.get(Harmful.NAME, "") + ".terms"
    table: dict[str, dict[str, dict[str, int]]] = {}
    for segment in segments:
        for row, tags in enumerate(segment.tags(), segment.first):
            scores: dict[str, Any] = tags["scores"]
            source = table.setdefault(tags["source"], {})
            groups = ["all documents", *(name[len(prefix) :] for name in scores if name.startswith(prefix))]
            for group in groups:
                entry = source.setdefault(group, {"before": 0, "after": 0, "harmful_before": 0, "harmful_after": 0})
                harm = bool(scores.get(harmful))
                entry["before"] += 1
                entry["harmful_before"] += harm
                entry["after"] += bool(kept[row])
                entry["harmful_after"] += harm and bool(kept[row])
    return table
