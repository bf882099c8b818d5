"""What a benchmark is to the rest: items read from its files, and a score for each from a model; and how its files are
found. One file per benchmark in tasks/ fills this in."""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from warploom.data.documents import list_files
from warploom.data.task_files import TASK_ENDINGS, read_rows
from warploom.errors import UserError
from warploom.evaluation.config import EvalConfig
from warploom.evaluation.text_model import TextModel

# {"id", "group", "prompt", "scores": {name: number}}, what the model answered, and {"flags": [...]} where something
# about the item must be counted. JSON values.
Record = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """A question of a benchmark."""

    id: str
    """The same in every run over the same files: by it answers are found again and models compared."""
    prompt: str
    values: Mapping[str, Any] = field(default_factory=dict)
    """What the task needs to score the answer."""
    group: str = ""
    """A part of the benchmark with figures of its own (a subject); "" where there is none."""


class Task(ABC):
    """A benchmark."""

    name: str
    version: str
    """Changes when the same answers would get other scores, or the same items other prompts."""
    num_shots: int = 0
    """Examples before each question unless told otherwise."""
    files: Mapping[str, Sequence[str]]
    """Role -> patterns of its files, see TaskFiles; the role "test" is that of the items."""
    is_limited_by_group: bool = False
    """Whether a limit on the items is one for each group."""

    @abstractmethod
    def items(self, files: TaskFiles, num_shots: int) -> list[Item]:
        """Read the items. Raises UserError for files that are missing or of another form."""

    @abstractmethod
    def answer(self, model: TextModel, items: Sequence[Item], config: EvalConfig) -> Iterator[Record]:
        """Yield the record of each item, in any order, as soon as it is there."""

    def finish(self, record: Record, item: Item, config: EvalConfig) -> Record | None:
        """Do what config allows now and the record of an earlier run lacks; None if there is nothing."""
        return None

    def check(self, config: EvalConfig) -> None:
        """Raise UserError if config lacks what the task needs, before any model is asked."""
        return None

    def settings(self, config: EvalConfig) -> dict[str, Any]:
        """What else an answer depends on, JSON values."""
        return {}


class TaskFiles:
    """The files of benchmarks in the given places: folders, and "task=path" for a benchmark that lies elsewhere."""

    def __init__(self, places: Sequence[str | Path]) -> None:
        self._files: dict[str, Path] = {}  # by the path that patterns are held against
        self._own: dict[str, Path] = {}
        for place in map(str, places):
            name, equals, path = place.partition("=")
            if equals and not Path(place).exists():
                self._own[name] = Path(path)
            else:
                root = Path(place).resolve()
                self._files |= {str(file.relative_to(root.parent)): file for file in list_files(root, TASK_ENDINGS)}

    def find(self, task: Task, role: str) -> list[Path]:
        """The files of the first pattern that any file matches, sorted; none if no pattern does.

        Patterns are those of fnmatch, held against the whole path in small letters, so that * crosses folders.
        """
        files = self._files
        own = self._own.get(task.name)
        if own is not None and own.is_file():
            return [own] if role == "test" else []
        if own is not None:
            files = {f"{task.name}/{file.relative_to(own)}": file for file in list_files(own, TASK_ENDINGS)}
        for pattern in task.files[role]:
            found = [file for path, file in files.items() if fnmatch.fnmatchcase(path.lower(), pattern)]
            if found:
                return sorted(found)
        return []

    def rows(self, task: Task, role: str) -> Iterator[tuple[str, Any]]:
        """Yield (name of the file or of the member of a tar, row). Raises UserError if there is no file."""
        files = self.find(task, role)
        if not files:
            wanted = " or ".join(task.files[role])
            raise UserError(
                f"no {role} file of {task.name} was found in the data (looked for {wanted}); name it with "
                f"--data {task.name}=PATH"
            )
        for file in files:
            yield from ((str(file.parent / name), row) for name, row in read_rows(file))


def require(row: Any, task: Task, *fields: str) -> list[Any]:
    """Return these fields of a row. Raises UserError naming those it lacks."""
    missing = [name for name in fields if not isinstance(row, dict) or name not in row]
    if missing:
        have = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
        raise UserError(f"a row of {task.name} lacks {', '.join(missing)}; it has {have}: see docs/evaluation.md")
    return [row[name] for name in fields]


def with_shots(examples: Sequence[str], question: str) -> str:
    """Put worked examples before a question, a blank line after each."""
    return "".join(f"{example}\n\n" for example in examples) + question


def first_shots(examples: Sequence[str], num_shots: int, task: Task) -> list[str]:
    """The first num_shots examples, in their order. Raises UserError if there are fewer."""
    if num_shots > len(examples):
        raise UserError(f"{task.name} has {len(examples)} examples to show, and shots is {num_shots}; lower it")
    return list(examples[:num_shots])
