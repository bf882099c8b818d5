"""What patch did to a model: the layers it swapped, those it left, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Swapped:
    """A layer that an op now does."""

    path: str
    """Name of the module in the model, as named_modules gives it; empty for the model itself."""
    kind: str
    """The op, with the activation it has taken in: "linear + relu"."""


@dataclass(frozen=True)
class Left:
    """A layer of a kind that patch knows, and why it stays as it was."""

    path: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What patch did; str() of it is a summary to print."""

    swapped: tuple[Swapped, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        lines = [f"{_count(self.swapped, 'layer')} swapped, {len(self.left)} left"]
        for kind, paths in _grouped((entry.kind, entry.path) for entry in self.swapped):
            lines.append(f"  swapped {len(paths):4d}  {kind}: {_example(paths)}")
        for text, paths in _grouped((f"{entry.kind}: {entry.reason}", entry.path) for entry in self.left):
            lines.append(f"  left    {len(paths):4d}  {text}: {_example(paths)}")
        return "\n".join(lines)


def _count(entries: tuple[object, ...], noun: str) -> str:
    return f"{len(entries)} {noun}" + ("" if len(entries) == 1 else "s")


def _grouped(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    groups: dict[str, list[str]] = {}
    for key, path in pairs:
        groups.setdefault(key, []).append(path)
    yield from groups.items()


def _example(paths: list[str]) -> str:
    first = paths[0] or "the model itself"
    return first if len(paths) == 1 else f"{first}, ..., {paths[-1]}"
