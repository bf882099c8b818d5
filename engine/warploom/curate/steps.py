"""The table of steps by name, and presets: sets of steps with the constants of a published recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from warploom.curate.classifier import Classify
from warploom.curate.clean import Confusables, Emoji, Punctuation, Unicode
from warploom.curate.decontaminate import Decontaminate
from warploom.curate.dedup import ExactDedup, LineDedup, NearDedup
from warploom.curate.document import Document, Step
from warploom.curate.extract import Extract
from warploom.curate.harmful import Bias, Harmful
from warploom.curate.language import Language
from warploom.curate.quality import C4Lines, FineWeb, GopherQuality, RefinedWebLines
from warploom.curate.redact import Redact
from warploom.curate.repetition import GopherRepetition
from warploom.curate.urls import UrlFilter
from warploom.curate.wording import Contractions, Misspelling, Spelling
from warploom.errors import UserError, nearest

STEPS: dict[str, type[Step]] = {
    step.NAME: step
    for step in (
        UrlFilter,
        Extract,
        Unicode,
        Emoji,
        Confusables,
        Punctuation,
        Contractions,
        Spelling,
        Misspelling,
        Language,
        GopherRepetition,
        GopherQuality,
        C4Lines,
        FineWeb,
        RefinedWebLines,
        Harmful,
        Bias,
        Classify,
        ExactDedup,
        LineDedup,
        NearDedup,
        Decontaminate,
        Redact,
    )
}

# name -> steps, each with what differs from its defaults.
PRESETS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    # Raffel et al. 2020: English by langdetect at 0.99; its bad-word list is the step `harmful`, with a list of yours.
    "c4": (("language", {"min_score": 0.99}), ("c4", {})),
    "gopher": (("gopher_quality", {}), ("gopher_repetition", {})),
    # Penedo et al. 2024, in the order of its pipeline; its first step is url_filter, with a list of yours.
    "fineweb": (
        ("extract", {"library": "trafilatura"}),
        ("language", {"min_score": 0.65}),
        ("gopher_repetition", {}),
        ("gopher_quality", {}),
        ("c4", {"terminal_punctuation": False}),
        ("fineweb", {}),
        ("near_dedup", {}),
        ("redact", {"kinds": ["email", "ip"]}),
    ),
    # Penedo et al. 2023; its 450 x 20 hashes differ from 14 x 8 only between Jaccard 0.7 and 0.85, which exact
    # Jaccard settles here.
    "refinedweb": (
        ("extract", {"library": "trafilatura"}),
        ("language", {"min_score": 0.65}),
        ("gopher_repetition", {}),
        ("gopher_quality", {}),
        ("refinedweb_lines", {}),
        ("near_dedup", {}),
    ),
}


@dataclass(kw_only=True)
class Function(Step):
    """A step written as a plain function over the stream of documents."""

    NAME = "function"

    function: Callable[[Iterable[Document]], Iterator[Document]]

    def __call__(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in self.function(documents):
            self.stats.documents += 1
            self.stats.bytes += len(document.text)
            yield document

    def settings(self) -> dict[str, Any]:
        return {"use": self.NAME, "name": self.name, "function": f"{self.function.__module__}.{self.function.__name__}"}


def build_steps(entries: Iterable[Mapping[str, Any]]) -> list[Step]:
    """Make the steps of the [[step]] tables of a pipeline file: {use: name, setting: value} or {preset: name}.

    Raises UserError for an unknown name or setting, or a value that is none.
    """
    steps: list[Step] = []
    for entry in entries:
        if "preset" in entry:
            if len(entry) > 1:
                raise UserError(f"a step with preset = {entry['preset']!r} takes no other setting; write its steps out")
            if entry["preset"] not in PRESETS:
                raise UserError(f"there is no preset {entry['preset']!r}{nearest(str(entry['preset']), PRESETS)}")
            steps += [_build(name, values) for name, values in PRESETS[entry["preset"]]]
        else:
            values = dict(entry)
            steps.append(_build(values.pop("use", None), values))
    return steps


def _build(name: object, values: Mapping[str, Any]) -> Step:
    if not isinstance(name, str) or name not in STEPS:
        raise UserError(f"a step needs use = one of the steps, got {name!r}{nearest(str(name), STEPS)}")
    known = {item.name: item for item in dataclasses.fields(STEPS[name])}
    for setting, value in values.items():
        if setting not in known:
            raise UserError(f"the step {name} has no setting {setting!r}{nearest(setting, known)}")
        default = known[setting].default
        number = isinstance(default, float) and isinstance(value, int | float) and not isinstance(value, bool)
        if default is not dataclasses.MISSING and not number and not isinstance(value, _accepted(default)):
            raise UserError(f"the step {name} takes {setting} as {_kind(default)}, got {value!r}")
    made: dict[str, Any] = {
        setting: tuple(value) if isinstance(value, list) else value for setting, value in values.items()
    }
    return STEPS[name](**made)


def _kind(default: object) -> str:
    if isinstance(default, int | float) and not isinstance(default, bool):
        return "a number"
    return {bool: "true or false", tuple: "a list", str: "a string"}.get(type(default), type(default).__name__)


def _accepted(default: object) -> tuple[type, ...]:
    if isinstance(default, tuple):
        return (list, tuple)
    if isinstance(default, int) and not isinstance(default, bool) and not isinstance(default, float):
        return (int, float)
    return (object,) if default is None else (type(default),)
