"""Op: the record of one kernel, from which its registration, contract tests, benches and doctor rows all come.

An op registers one or more operators `torch.ops.warploom.<name>_fwd`, `<name>_bwd`, ... whose implementation picks the
back end at each call. So the choice is opaque to torch.compile and torch.export, and forcing a back end works in
compiled code too. Gradients come from a torch.autograd.Function outside the operators: half the cost per call of
custom_op with register_autograd (docs/architecture.md).
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from warploom.errors import nearest

BACKENDS = ("reference", "cpu", "triton", "cuda")
# Tried in this order; an op's record decides which of them exist.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
REGISTRY: dict[str, Op] = {}

_LIBRARY = torch.library.Library("warploom", "DEF")


@dataclass(frozen=True)
class Backend:
    """One implementation of an op."""

    kernels: Mapping[str, Callable[..., Any]]  # operator name without the op's prefix ("fwd", "bwd") -> callable
    devices: tuple[str, ...]  # torch device types it runs on
    missing: Callable[[], str | None] = lambda: None  # why it cannot run on this machine, None if it can
    refuses: Callable[..., str | None] = lambda *args: None  # why it cannot take these operator arguments (of fwd)


@dataclass(frozen=True)
class Case:
    """One input of an op. `make` returns the public function's keyword arguments with float64 tensors; users of the
    case cast the floating ones to the dtype under test, and take gradients for those not named in `no_grad`."""

    name: str
    make: Callable[[torch.Generator], dict[str, Any]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    no_grad: tuple[str, ...] = ()
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
    """One input to time. flops and bytes are those of the forward that any implementation must spend; a benchmark
    divides by them to state a share of the measured ceiling."""

    name: str
    make: Callable[[torch.Generator], dict[str, Any]]
    flops: int = 0
    bytes_per_element: int = 0  # elements read and written at least once; times the dtype's size gives bytes
    backward_flops: int = 0
    backward_bytes_per_element: int = 0


@dataclass(eq=False)
class Op:
    """The record of one op.

    function: the public function. reference: the same in plain torch, differentiable, any floating dtype (float64 is
    the ground truth of every test). torch_peer: what a torch user would call today; the error and the speed to beat.
    schemas and fakes: per operator suffix, the torch.library schema and the fake implementation (shapes only).
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
    calls: Counter[str] = field(default_factory=Counter)  # "<operator>/<back end>" -> times chosen, for tests

    def __post_init__(self) -> None:
        REGISTRY[self.name] = self
        for suffix, schema in self.schemas.items():
            operator = f"{self.name}_{suffix}"
            _LIBRARY.define(operator + schema)
            _LIBRARY.impl(operator, self._dispatcher(suffix), "CompositeExplicitAutograd")
            torch.library.register_fake(f"warploom::{operator}", self.fakes[suffix], lib=_LIBRARY)

    def _dispatcher(self, suffix: str) -> Callable[..., Any]:
        def dispatch(*args: Any) -> Any:
            name, backend = self._select(suffix, args)
            self.calls[f"{suffix}/{name}"] += 1
            return backend.kernels[suffix](*args)

        return dispatch

    def _select(self, suffix: str, args: tuple[Any, ...]) -> tuple[str, Backend]:
        device = next(arg for arg in args if isinstance(arg, Tensor)).device.type
        forced = _forced.get(self.name, _forced.get("*"))
        if forced is not None:
            reason = self.refusal(forced, device, *args)
            if reason is not None:
                raise RuntimeError(
                    f"back end {forced!r} was asked for, but {self.name}_{suffix} cannot use it: {reason}"
                )
            return forced, self.backends[forced]
        for name in PREFERENCE.get(device, ("reference",)):
            if self.refusal(name, device, *args) is None:
                return name, self.backends[name]
        raise RuntimeError(f"{self.name}_{suffix} has no back end for device {device!r}")

    def refusal(self, name: str, device: str, *args: Any) -> str | None:
        """Say why the back end cannot serve this device (and these operator arguments, if given), None if it can."""
        backend = self.backends.get(name)
        if backend is None:
            return f"{self.name} has no back end {name!r}, it has " + ", ".join(self.backends)
        if device not in backend.devices:
            return f"it runs on {' and '.join(backend.devices)}, not on {device}"
        return backend.missing() or (backend.refuses(*args) if args else None)


def _parse_forced(text: str) -> dict[str, str]:
    """Read WARPLOOM_BACKEND: "reference" for every op, or "attention=cpu,layer_norm=reference" for some."""
    forced = {}
    for part in filter(None, text.split(",")):
        op, _, name = part.rpartition("=")
        forced[op or "*"] = _known_backend(name)
    return forced


def _known_backend(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"no back end is called {name!r}{nearest(name, BACKENDS)}")
    return name


_forced: dict[str, str] = _parse_forced(os.environ.get("WARPLOOM_BACKEND", ""))


@contextlib.contextmanager
def backend(name: str | None = None, /, **by_op: str) -> Iterator[None]:
    """Force a back end inside a with block: backend("reference") for every op, backend(attention="cpu") for one.

    The choice is made where an operator runs, so a backward pass belongs inside the block too. It holds for the whole
    process, since autograd runs backward passes in threads of its own. An op that cannot use the forced back end raises
    RuntimeError; nothing falls back. Raises ValueError for an unknown back end or op.
    """
    global _forced
    for op in by_op:
        if op not in REGISTRY:
            raise ValueError(f"no op is called {op!r}{nearest(op, REGISTRY)}")
    wanted = {op: _known_backend(value) for op, value in by_op.items()}
    if name is not None:
        wanted["*"] = _known_backend(name)
    before = _forced
    _forced = {**({} if name is not None else before), **wanted}
    try:
        yield
    finally:
        _forced = before
