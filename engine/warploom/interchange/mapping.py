"""The tensors of another framework and ours, entry by entry, in both directions.

Every transformation is linear algebra on rows and columns that can be undone, so one list of entries serves import and
export.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from warploom.errors import UserError

_MAX_SHOWN = 8


@dataclass(frozen=True)
class Entry:
    """Some tensors there and the tensors here that hold the same numbers."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    load: Callable[..., Sequence[Tensor]]
    """Theirs, in order, to ours, in order."""
    dump: Callable[..., Sequence[Tensor]]
    """The reverse."""


def same(theirs: str, ours: str) -> Entry:
    return Entry((theirs,), (ours,), lambda x: (x,), lambda x: (x,))


def transposed(theirs: str, ours: str) -> Entry:
    """theirs: (in, out), as in GPT-2."""
    return Entry((theirs,), (ours,), lambda x: (x.t(),), lambda x: (x.t(),))


def scaled(theirs: str, ours: str, factor: float) -> Entry:
    """ours = factor * theirs."""
    return Entry((theirs,), (ours,), lambda x: (x * factor,), lambda x: (x / factor,))


def stacked(theirs: str, ours: Sequence[str], rows: Sequence[int], *, transpose: bool = False) -> Entry:
    """theirs holds ours one below the other, each with so many rows (columns if it is transposed)."""
    dim = 1 if transpose else 0
    turn = torch.t if transpose else (lambda x: x)
    return Entry(
        (theirs,),
        tuple(ours),
        lambda x: tuple(turn(part) for part in x.split(list(rows), dim)),
        lambda *parts: (torch.cat([turn(part) for part in parts], dim),),
    )


def interleaved(theirs: str, ours: Sequence[str], counts: Sequence[int], head_dim: int) -> Entry:
    """theirs holds, for one key/value head after another, counts of heads of each of ours (Falcon)."""

    def load(x: Tensor) -> tuple[Tensor, ...]:
        groups = x.unflatten(0, (-1, sum(counts), head_dim))  # (H_kv, heads of the group, D, ...)
        return tuple(part.flatten(0, 2) for part in groups.split(list(counts), 1))

    def dump(*parts: Tensor) -> tuple[Tensor, ...]:
        groups = [p.unflatten(0, (-1, count, head_dim)) for p, count in zip(parts, counts, strict=True)]
        return (torch.cat(groups, 1).flatten(0, 2),)

    return Entry((theirs,), tuple(ours), load, dump)


def below(theirs: str, ours: str, rows: int) -> Entry:
    """theirs begins with so many rows that no token uses."""
    return Entry((theirs,), (ours,), lambda x: (x[rows:],), lambda x: (torch.cat([x.new_zeros(rows, x.shape[1]), x]),))


def with_parameters(make: Callable[..., Entry], theirs: str, ours: str, bias: bool, *arguments: object) -> list[Entry]:
    """Entries of a layer's weight and, if it has one, bias."""
    names = ("weight", "bias") if bias else ("weight",)
    return [make(f"{theirs}.{name}", f"{ours}.{name}", *arguments) for name in names]


def load_tensors(
    entries: Iterable[Entry], read: Callable[[str], Tensor], available: set[str], used_by: str
) -> dict[str, Tensor]:
    """Return our tensors, float32 and contiguous, of those that read gives by name.

    Raises UserError naming the tensors that are missing or have a shape that cannot be split as it must.
    """
    entries = list(entries)
    missing = sorted({name for entry in entries for name in entry.theirs} - available)
    if missing:
        raise UserError(f"{used_by} lacks {_listed(missing)}; the file is not whole, or of another architecture")
    weights: dict[str, Tensor] = {}
    for entry in entries:
        try:
            parts = entry.load(*(read(name).float() for name in entry.theirs))
        except RuntimeError as error:
            raise UserError(
                f"{used_by}: {', '.join(entry.theirs)} does not have the shape of its config.json: {error}"
            ) from error
        weights.update((name, part.contiguous()) for name, part in zip(entry.ours, parts, strict=True))
    return weights


def dump_tensors(entries: Iterable[Entry], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return their tensors of ours, contiguous."""
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        parts = entry.dump(*(weights[name].detach() for name in entry.ours))
        tensors.update((name, part.contiguous()) for name, part in zip(entry.theirs, parts, strict=True))
    return tensors


def refuse_rest(entries: Iterable[Entry], available: Iterable[str], used_by: str) -> None:
    """Raise UserError if a tensor is there that no entry reads: the model would not be the same without it."""
    rest = sorted(set(available) - {name for entry in entries for name in entry.theirs})
    if rest:
        raise UserError(f"{used_by} has tensors that this architecture does not know: {_listed(rest)}")


def _listed(names: list[str]) -> str:
    more = len(names) - _MAX_SHOWN
    return ", ".join(names[:_MAX_SHOWN]) + (f" and {more} more" if more > 0 else "")
