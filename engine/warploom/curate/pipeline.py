"""A pipeline: sources, steps, and what is written at the end. Read from a TOML file, or made in a Python file."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from warploom.curate.document import Step
from warploom.curate.steps import build_steps
from warploom.errors import UserError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Source:
    """Where documents come from. Sources are reported, mixed and repeated apart."""

    name: str
    paths: tuple[str, ...]
    """Files, folders and globs, or hf:NAME:SPLIT."""
    text_column: str = "auto"
    weight: float | None = None
    """Share of the mix beside the other weights; by default the source's tokens."""
    max_epochs: float = 4.0
    """The mix repeats no document of this source more often."""


@dataclass(frozen=True)
class Heldout:
    """The part that is only measured on."""

    fraction: float = 0.05
    by: Literal["cluster and domain", "cluster"] = "cluster and domain"
    """What stays on one side together: near-duplicates, and pages of one domain."""


@dataclass(frozen=True)
class Tokens:
    """Token shards, written if this table is there."""

    vocab_size: int = 8192
    tokenizer: str | None = None
    """A tokenizer.json or its folder, instead of training one on the kept text."""


@dataclass(frozen=True)
class Mix:
    """How much of each source a training run sees."""

    temperature: float = 1.0
    """Shares are raised to 1 / temperature: above 1, small sources are seen more often."""
    tokens: int | None = None
    """Length of the mix; by default what the sources have, seen once where the weights allow it."""
    repeat_clusters: bool = False
    """See a document as often as the size of its cluster of near-duplicates asks for, as FineWeb-2 did."""


@dataclass(frozen=True)
class Pipeline:
    """Everything that decides the result."""

    sources: tuple[Source, ...]
    steps: Sequence[Step]
    seed: int = 0
    keep_dropped: bool = False
    """Write the dropped documents too, each with its reason."""
    heldout: Heldout = field(default_factory=Heldout)
    tokens: Tokens | None = None
    mix: Mix = field(default_factory=Mix)

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("the pipeline has no [[source]]; give one with a name and paths")
        for kind, names in (("source", [s.name for s in self.sources]), ("step", [s.name for s in self.steps])):
            for name in names:
                if names.count(name) > 1:
                    raise UserError(f"two {kind}s have the name {name!r}; set name to tell them apart")
        for step in self.steps:
            if "." in step.name:  # which parts it from its rules in reasons and scores
                raise UserError(f"a step's name must have no dot, got {step.name!r}")
        for use in ("exact_dedup", "near_dedup", "line_dedup"):
            if sum(step.NAME == use for step in self.steps) > 1:
                raise UserError(f"the step {use} stands twice; keep one")
        spanned: Step | None = None
        for step in self.steps:
            if step.kind == "span" or step.NAME == "line_dedup":
                spanned = step
            elif step.kind == "edit" and spanned is not None:
                raise UserError(
                    f"the step {step.name} changes the text after {spanned.name} has marked places in it; put it before"
                )
        if not 0 < self.heldout.fraction < 1:
            raise UserError(f"heldout.fraction must be between 0 and 1, got {self.heldout.fraction}; 0.05 is usual")
        if self.mix.temperature <= 0:
            raise UserError(
                f"mix.temperature must be above 0, got {self.mix.temperature}; 1 leaves the shares as they are"
            )

    def settings(self) -> dict[str, Any]:
        """Every setting, as JSON values."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        plain = {
            name: dataclasses.asdict(value)
            if dataclasses.is_dataclass(value) and not isinstance(value, type)
            else value
            for name, value in values.items()
            if name not in ("sources", "steps")
        }
        sources = [dataclasses.asdict(source) for source in self.sources]
        return {"sources": sources, "steps": [step.settings() for step in self.steps], **plain}


def load_pipeline(path: Path) -> Pipeline:
    """Read a pipeline from a .toml file, or from a .py file whose function `pipeline()` returns it.

    Raises UserError for what is missing, unknown or of the wrong type.
    """
    if path.suffix == ".py":
        return _load_python(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the pipeline {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}; mend that line") from None
    known = ("source", "step", *(item.name for item in dataclasses.fields(Pipeline)))
    for name in values:
        if name not in known:
            raise UserError(f"{path} has an unknown entry {name!r}{nearest(name, known)}")
    for name in ("source", "step"):
        if not isinstance(values.get(name, []), list):
            raise UserError(f"{path}: {name} must be a list of tables; write [[{name}]]")
    sources = tuple(_table(Source, entry, "source") for entry in values.pop("source", ()))
    steps = build_steps(values.pop("step", ()))
    for name, table in (("heldout", Heldout), ("tokens", Tokens), ("mix", Mix)):
        if name in values:
            values[name] = _table(table, values[name], name)
    return Pipeline(sources=sources, steps=steps, **values)


def _table(cls: type[Any], entry: Mapping[str, Any], name: str) -> Any:
    known = [item.name for item in dataclasses.fields(cls)]
    if not isinstance(entry, Mapping):
        raise UserError(f"{name} must be a table, got {entry!r}")
    for key in entry:
        if key not in known:
            raise UserError(f"the table {name} has no entry {key!r}{nearest(key, known)}")
    entry = {key: (value,) if key == "paths" and isinstance(value, str) else value for key, value in entry.items()}
    try:
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()})
    except TypeError as error:
        raise UserError(f"the table {name} is not complete: {error}") from None


def _load_python(path: Path) -> Pipeline:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"cannot read the pipeline {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = getattr(module, "pipeline", None)
    result = made() if callable(made) else None
    if not isinstance(result, Pipeline):
        raise UserError(f"{path} must have a function pipeline() that returns a warploom.curate.pipeline.Pipeline")
    return result
