"""Op: the record of one kernel, from which its registration, contract tests, benches and doctor rows all come.

An op registers one or more operators `torch.ops.warploom.<name>_fwd`, `<name>_bwd`, ... whose implementation picks the
back end at each call. So the choice is opaque to torch.compile and torch.export, and forcing a back end works in
compiled code too. Gradients come from a torch.autograd.Function outside the operators: half the cost per call of
custom_op with register_autograd (docs/architecture.md).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from warploom.errors import UserError, nearest
from warploom.ops import _tuning

BACKENDS = ("reference", "cpu", "triton", "cuda", "cublaslt")
# Tried in this order; an op's record decides which of them exist. Triton comes before CUDA C++ and this before cuBLASLt
# as long as no card has shown which is faster.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "cublaslt", "reference")}
REGISTRY: dict[str, Op] = {}
_Objection = Callable[..., "str | None"]
# The back end and its name, why not these arguments, why another first, key in calls.
_Candidate = tuple["Backend", str, _Objection, _Objection, str]

_LIBRARY = torch.library.Library("warploom", "DEF")
_log = logging.getLogger(__name__)


class BackendUnavailable(UserError, RuntimeError):
    """A back end that was asked for cannot serve a call."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op. Keys of the mappings are operator names without the op's prefix: "fwd", "bwd"."""

    kernels: Mapping[str, Callable[..., Any]]
    devices: tuple[str, ...]  # torch device types it runs on
    missing: Callable[[], str | None] = lambda: None  # why it cannot run in this process, None if it can
    refuses: Mapping[str, Callable[..., str | None]] = field(default_factory=dict)  # why it cannot take these arguments
    # Why the next back end is the faster one for these arguments, by measurement; asked unless this one is forced.
    slower: Mapping[str, Callable[..., str | None]] = field(default_factory=dict)
    leaves: str = ""  # what `slower` leaves to the next back end, in words for warploom doctor


@dataclass(frozen=True)
class Case:
    """One input of an op. `make` returns the public function's keyword arguments with float64 tensors; users of the
    case cast the floating ones to the dtype under test (those named in `wide` to float32 at least), and take gradients
    for those not named in `no_grad`."""

    name: str
    make: Callable[[torch.Generator], dict[str, Any]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    no_grad: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    gradcheck: bool = False  # small enough for finite differences in float64


@dataclass(frozen=True)
class BadCase:
    """One input that must be refused, by which error, with which words."""

    name: str
    make: Callable[[], dict[str, Any]]
    error: type[Exception]
    match: str


@dataclass(frozen=True)
class BenchCase:
    """One input to time. flops and bytes are those that any implementation must spend; a benchmark divides by them to
    state a share of the measured ceiling."""

    name: str
    make: Callable[[torch.Generator], dict[str, Any]]
    wide: tuple[str, ...] = ()  # as in Case
    flops: int = 0
    bytes_per_element: int = 0  # elements read and written at least once; times the dtype's size gives bytes
    backward_flops: int = 0
    backward_bytes_per_element: int = 0
    backward_in_forward: bool = False  # the gradients are made in the forward pass: the two can be timed only together


@dataclass(eq=False)
class Op:
    """The record of one op.

    function: the public function. reference: the same in plain torch, differentiable, any floating dtype (float64 is
    the ground truth of every test). torch_peer: what a torch user would call today; the error and the speed to beat.
    schemas, fakes: per operator suffix, the torch.library schema (a tensor or a list of them first: its device decides
    the back end) and the fake implementation (shapes and strides only). checks: per suffix, argument checks that read
    values; they run inside the operator, where the graph capture of torch.compile does not see them, and on the CPU
    alone, since reading values of another device would stall it. differentiable: whether autograd sees it; an op on
    lists of tensors is not. mutates: lists that the function writes into instead of returning anything.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    torch_peer: Callable[..., Any]
    schemas: Mapping[str, str]
    fakes: Mapping[str, Callable[..., Any]]
    backends: Mapping[str, Backend]
    cases: tuple[Case, ...]
    bad_cases: tuple[BadCase, ...] = ()
    bench_cases: tuple[BenchCase, ...] = ()
    checks: Mapping[str, Callable[..., None]] = field(default_factory=dict)
    differentiable: bool = True
    mutates: tuple[str, ...] = ()
    # "<operator suffix>/<back end>" -> times chosen. For tests: threads that race may lose a count.
    calls: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        REGISTRY[self.name] = self
        for suffix, schema in self.schemas.items():
            operator = f"{self.name}_{suffix}"
            _LIBRARY.define(operator + schema)
            _LIBRARY.impl(operator, self._dispatcher(suffix), "CompositeExplicitAutograd")
            torch.library.register_fake(f"warploom::{operator}", self.fakes[suffix], lib=_LIBRARY)

    def _dispatcher(self, suffix: str) -> Callable[..., Any]:
        check = self.checks.get(suffix)
        calls = self.calls
        # Per device. What is missing stays so while a process lives.
        usable: dict[str, list[_Candidate]] = {}

        def dispatch(*args: Any) -> Any:
            first = args[0][0] if isinstance(args[0], list) else args[0]
            device = first.device.type
            winner = None
            if check is not None and device == "cpu":
                check(*args)
            forced = _forced.get(self.name, _forced.get("*")) if _forced else None
            if forced is not None:
                reason = self.refusal(forced, device, suffix, *args)
                if reason is not None:
                    raise BackendUnavailable(
                        f"back end {forced!r} was asked for, but {self.name}_{suffix} cannot use it: {reason}"
                    )
                candidates = [self._candidate(forced, suffix)]
            else:
                if device not in usable:
                    names = (name for name in _order(device) if self.refusal(name, device) is None)
                    usable[device] = [self._candidate(name, suffix) for name in names]
                candidates = usable[device]
                if device in _tuning.MEASURED_DEVICES:
                    winner = self._winner(suffix, first.device, args, candidates)
                    candidates = sorted(candidates, key=lambda candidate: candidate[1] != winner)
            for backend, name, refuses, slower, key in candidates:
                if refuses(*args) is None and (forced is not None or name == winner or slower(*args) is None):
                    if key not in calls:
                        _log.info("%s: %s runs", self.name, key)
                    calls[key] += 1
                    return backend.kernels[suffix](*args)
            raise BackendUnavailable(f"{self.name}_{suffix} has no back end for device {device!r}")

        return dispatch

    def _candidate(self, name: str, suffix: str) -> _Candidate:
        backend = self.backends[name]
        refuses, slower = backend.refuses.get(suffix, _takes_all), backend.slower.get(suffix, _takes_all)
        return backend, name, refuses, slower, f"{suffix}/{name}"

    def _winner(
        self, suffix: str, device: torch.device, args: tuple[Any, ...], candidates: list[_Candidate]
    ) -> str | None:
        """Name the back end that was measured as the fastest for these arguments, None if none was."""
        operator = f"{self.name}_{suffix}"
        winner = _tuning.winner(operator, device, args)
        if winner is None and _tuning.is_active(device.type):
            takers = [candidate for candidate in candidates if candidate[2](*args) is None]
            _tuning.measure(operator, device, args, {name: b.kernels[suffix] for b, name, *_ in takers})
            winner = _tuning.winner(operator, device, args)
        return winner

    def refusal(self, name: str, device: str, suffix: str | None = None, *args: Any) -> str | None:
        """Say why the back end cannot serve this device (and these arguments of operator `suffix`), None if it can."""
        backend = self.backends.get(name)
        if backend is None:
            return f"{self.name} has no back end {name!r}, it has " + ", ".join(self.backends)
        if device not in backend.devices:
            return f"it runs on {' and '.join(backend.devices)}, not on {device}"
        reason = backend.missing()
        if reason is None and suffix is not None and suffix in backend.refuses:
            reason = backend.refuses[suffix](*args)
        return reason

    def choice(self, device: str) -> str:
        """Name the back end that serves this device when none is forced and it refuses no argument."""
        return next(name for name in _order(device) if self.refusal(name, device) is None)

    def forced(self) -> str | None:
        """Name the back end that the user demands for this op, None if the choice is free."""
        return _forced.get(self.name, _forced.get("*")) if _forced else None


def _takes_all(*args: Any) -> None:
    return None


def _order(device: str) -> tuple[str, ...]:
    return PREFERENCE.get(device, ("reference",))


def _parse_forced(text: str, ops: Iterable[str]) -> dict[str, str]:
    """Read "reference", for every op, or "attention=cpu,layer_norm=reference", for some. Raises ValueError."""
    forced = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        op, equals, name = (word.strip() for word in part.rpartition("="))
        if equals and op not in ops:
            raise ValueError(f"no op is called {op!r}{nearest(op, ops)}")
        if name not in BACKENDS:
            raise ValueError(f"no back end is called {name!r}{nearest(name, BACKENDS)}")
        forced[op or "*"] = name
    return forced


# Op name, or "*" for every op, -> the back end it must use.
_forced: dict[str, str] = {}


def force_from_environment() -> None:
    """Set the forced back ends from WARPLOOM_BACKEND. Called once, when every op is registered."""
    global _forced
    try:
        _forced = _parse_forced(os.environ.get("WARPLOOM_BACKEND", ""), REGISTRY)
    except ValueError as error:
        raise UserError(f"WARPLOOM_BACKEND: {error}") from None


@contextlib.contextmanager
def backend(name: str | None = None, /, **by_op: str) -> Iterator[None]:
    """Force a back end inside a with block: backend("reference") for every op, backend(attention="cpu") for one.

    The choice is made where an operator runs, so a backward pass belongs inside the block too, and code compiled before
    obeys it. It holds for the whole process, since autograd runs backward passes in threads of its own; do not open
    blocks in several threads at once. An op that cannot use the forced back end raises BackendUnavailable, a
    RuntimeError; nothing falls back. Raises ValueError for an unknown back end or op.
    """
    global _forced
    if torch.compiler.is_compiling():
        raise RuntimeError("backend() inside compiled code would have no effect: open the with block around the call")
    parts = [f"{op}={choice}" for op, choice in by_op.items()]
    wanted = _parse_forced(",".join(parts if name is None else [name, *parts]), REGISTRY)
    before = _forced
    _forced = {**({} if name is not None else before), **wanted}
    try:
        yield
    finally:
        _forced = before
