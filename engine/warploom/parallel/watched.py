"""Every collective as it begins: reported to the launcher and, in checked mode, compared over its processes first.

For the length of a with block the methods of torch's ProcessGroup are replaced by ones that look and then do the same.
That is the one place through which all of them go from Python: this package's, fully_shard's and the pipeline's.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from warploom.errors import CollectiveMismatch
from warploom.parallel import heartbeat

# Method -> its usual name, and which of its arguments must be alike on all processes: what each puts in, or gets where
# only one puts something in. None: sizes may differ. Names differ between versions of torch; those it has are taken.
_COLLECTIVES: dict[str, tuple[str, int | None]] = {
    "allreduce": ("all_reduce", 0),
    "allreduce_coalesced": ("all_reduce_coalesced", 0),
    "allgather": ("all_gather", 1),
    "allgather_coalesced": ("all_gather_coalesced", 1),
    "_allgather_base": ("all_gather_into_tensor", 1),
    "all_gather_single": ("all_gather_into_tensor", 1),
    "alltoall": ("all_to_all", None),
    "alltoall_base": ("all_to_all_single", None),
    "all_to_all_single": ("all_to_all_single", None),
    "barrier": ("barrier", None),
    "broadcast": ("broadcast", 0),
    "gather": ("gather", 1),
    "reduce": ("reduce", 0),
    "reduce_scatter": ("reduce_scatter", 0),
    "_reduce_scatter_base": ("reduce_scatter_tensor", 0),
    "reduce_scatter_single": ("reduce_scatter_tensor", 0),
    "scatter": ("scatter", 0),
}
_POINT_TO_POINT = {"send": "send", "recv": "recv"}
_FROM_ONE = ("barrier", "broadcast", "recv", "scatter")  # not everyone who calls puts something in
_IN_PLACE = ("allreduce", "allreduce_coalesced", "reduce", "send")  # what is put in comes first, else the result does
_LOOK_EVERY_S = 0.2
Look = Callable[[str, dist.ProcessGroup, tuple[Any, ...], dict[str, Any]], None]
_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class Call:
    """One collective of one process."""

    what: str  # with everything that must be alike: name, reduction, root, dtype and shape
    where: str  # file:line of who called
    sent: tuple[int, ...] = ()  # all_to_all_single: rows for each process, and from each
    received: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.what} at {self.where}"


@contextmanager
def watched(checks: CollectiveChecks | None = None) -> Iterator[None]:
    """Report every collective to the launcher, and have checks, if given, look at it before it begins."""

    def look(name: str, group: dist.ProcessGroup, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        what = _describe(name, args, kwargs)
        heartbeat.report_collective(what)
        if checks is None:
            return
        if name in _POINT_TO_POINT:
            checks.message(group, Call(what, _caller()), int(args[1]), int(args[2]), sends=name == "send")
        else:
            splits = tuple(map(tuple, args[2:4])) if name in ("alltoall_base", "all_to_all_single") else ((), ())
            checks.collective(group, Call(what, _caller(), sent=splits[1], received=splits[0]))

    with looked_at(look):
        yield


@contextmanager
def looked_at(look: Look) -> Iterator[None]:
    """Call look(name of the method, group, arguments, named arguments) before each collective of this process begins,
    for the length of a with block; blocks may lie in each other."""
    methods = [name for name in (*_COLLECTIVES, *_POINT_TO_POINT) if hasattr(dist.ProcessGroup, name)]
    # As they lie in the class: what getattr gives of a compiled method is no method any more when it is put back.
    originals = {name: vars(dist.ProcessGroup)[name] for name in methods}
    for name in methods:
        setattr(dist.ProcessGroup, name, _looking(name, getattr(dist.ProcessGroup, name), look))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist.ProcessGroup, name, original)


def put_in(name: str, args: tuple[Any, ...]) -> list[Tensor]:
    """Return the tensors that a process contributes by a call of this method, none where only one process does."""
    return [] if name in _FROM_ONE else list(_flat(args[0 if name in _IN_PLACE else 1]))


def _flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for item in value:
            yield from _flat(item)


def _looking(name: str, original: Callable[..., Any], look: Look) -> Callable[..., Any]:
    def call(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        look(name, group, args, kwargs)
        return original(group, *args, **kwargs)

    return call


def _describe(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    if name in _POINT_TO_POINT:
        return f"{_POINT_TO_POINT[name]} {_tensors(args[0])}"
    usual_name, index = _COLLECTIVES[name]
    words = [usual_name]
    for option in (*args, *kwargs.values()):
        if hasattr(option, "reduceOp"):
            words.append(option.reduceOp.op.name)
        if hasattr(option, "rootRank") and option.rootRank >= 0:
            words.append(f"root {option.rootRank}")
    if index is not None:
        words.append(_tensors(args[index]))
    elif args and isinstance(args[0], Tensor):
        words.append(str(args[0].dtype).removeprefix("torch."))
    return " ".join(words)


def _tensors(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return ", ".join(_tensors(item) for item in value)


def _caller() -> str:
    """Return file:line of the innermost call that is neither torch's nor this file's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_TORCH, __file__)):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno}"


class CollectiveChecks:
    """Compares each collective over its processes, through the store, before any of them begins it.

    Raises CollectiveMismatch on every process of a group that calls something else, with another reduction, root,
    dtype or shape, or in another order, and on two that wait for each other in different groups. Of a send and a recv
    that do not fit, the later one raises. A process that comes to no collective at all is waited for: it may be busy.
    """

    def __init__(self, store: dist.Store, timeout_s: float) -> None:
        self._store, self._timeout_s = dist.PrefixStore("collectives", store), timeout_s
        self._rank = dist.get_rank()
        self._counts: Counter[str] = Counter()

    def collective(self, group: dist.ProcessGroup, call: Call) -> None:
        ranks = dist.get_process_group_ranks(group)
        name = _name(group, ranks)
        number = self._counts[name]
        self._counts[name] += 1
        self._store.set(f"{name}/{number}/{self._rank}", json.dumps(asdict(call)))
        self._store.set(f"at/{self._rank}", json.dumps([name, number, ranks, str(call)]))
        for rank in ranks:
            if rank != self._rank:
                self._compare(call, rank, self._wait_for(name, number, rank, ranks, call), ranks)
        if number >= 2:
            # All have come to the one before this, so all have read what was said of the one before that.
            self._store.delete_key(f"{name}/{number - 2}/{self._rank}")

    def message(self, group: dist.ProcessGroup, call: Call, peer: int, tag: int, *, sends: bool) -> None:
        """peer: rank in the group."""
        ranks = dist.get_process_group_ranks(group)
        ends = (self._rank, ranks[peer]) if sends else (ranks[peer], self._rank)
        name = f"{_name(group, ranks)}/{ends[0]}>{ends[1]}/{tag}"
        side, other = ("send", "recv") if sends else ("recv", "send")
        number = self._counts[f"{name}/{side}"]
        self._counts[f"{name}/{side}"] += 1
        self._store.set(f"{name}/{number}/{side}", json.dumps(asdict(call)))
        # Not waited for: both may begin with what the other ends with. Whoever comes second compares; the count, which
        # the store makes, says who that is.
        if self._store.add(f"{name}/{number}", 1) == 2:
            theirs = _read(self._store, f"{name}/{number}/{other}")
            for key in (f"{name}/{number}", f"{name}/{number}/{side}", f"{name}/{number}/{other}"):
                self._store.delete_key(key)
            if call.what.removeprefix(side) != theirs.what.removeprefix(other):
                raise self._mismatch(call, ranks[peer], str(theirs))

    def _wait_for(self, name: str, number: int, rank: int, ranks: Sequence[int], call: Call) -> Call:
        key, started = f"{name}/{number}/{rank}", time.monotonic()
        look_at = started + _LOOK_EVERY_S
        # Asked for again and again: torch warns of every wait that runs out of time.
        while not self._store.check([key]):
            now = time.monotonic()
            if now > look_at:
                look_at = now + _LOOK_EVERY_S
                self._look_for_a_circle(name, number, rank, call)
                if now > started + self._timeout_s:
                    raise self._mismatch(call, rank, f"nothing for {self._timeout_s:.0f} s")
            time.sleep(min(0.01, 0.1 * (now - started)))
        return _read(self._store, key)

    def _look_for_a_circle(self, name: str, number: int, rank: int, call: Call) -> None:
        """Raise if rank waits for this process in another collective, to which this one has not come."""
        if not self._store.check([f"at/{rank}"]):
            return
        their_name, their_number, their_ranks, their_call = json.loads(self._store.get(f"at/{rank}"))
        # Not come to: so it cannot have ended there, and is there now.
        if self._rank in their_ranks and their_name != name and self._counts[their_name] <= their_number:
            raise self._mismatch(call, rank, their_call)

    def _compare(self, call: Call, rank: int, theirs: Call, ranks: Sequence[int]) -> None:
        here, there = ranks.index(self._rank), ranks.index(rank)
        if call.what != theirs.what:
            raise self._mismatch(call, rank, str(theirs))
        if call.sent and (call.sent[there] != theirs.received[here] or call.received[there] != theirs.sent[here]):
            sizes = f"sends {theirs.sent[here]} rows to rank {self._rank} and expects {theirs.received[here]}"
            mine = f"{call}, sends {call.sent[there]} rows to rank {rank} and expects {call.received[there]}"
            raise self._mismatch(mine, rank, f"{theirs}, {sizes}")

    def _mismatch(self, call: Call | str, rank: int, theirs: str) -> CollectiveMismatch:
        return CollectiveMismatch(
            f"the processes do not do the same: rank {self._rank} calls {call}, and rank {rank} calls {theirs}"
        )


def _name(group: dist.ProcessGroup, ranks: Sequence[int]) -> str:
    return f"{group.group_name}:{','.join(map(str, ranks))}"


def _read(store: dist.Store, key: str) -> Call:
    values = json.loads(store.get(key))
    return Call(values["what"], values["where"], tuple(values["sent"]), tuple(values["received"]))
