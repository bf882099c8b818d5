"""Does an op keep what its record promises? The checks that the contract tests and `warploom verify` share, and how
verify walks through every case, dtype, back end and instruction-set level. Run as a program it proves the ops that its
arguments name on back end `cpu`, in a process of its own because a process keeps the level it first chose."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from warploom.ops import _extension
from warploom.ops._accuracy import Results, Trial
from warploom.ops._op import REGISTRY, BackendUnavailable, Op, backend

Layout = Callable[[Tensor], Tensor]


class Refuted(AssertionError):
    """An op does not do what its record promises."""


def require(kept: bool, message: str) -> None:
    if not kept:
        raise Refuted(message)


def as_given(tensor: Tensor) -> Tensor:
    return tensor


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch's number of threads inside a with block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_accuracy(op: Op, name: str, trial: Trial, layout: Layout = as_given) -> float:
    """The back end, and no other, runs; its outputs and gradients have the peer's shapes and dtypes, and errors within
    what ops/_accuracy.py allows. Returns the worst error as a share of what is allowed."""
    before = op.calls.copy()
    with backend(**{op.name: name}):
        results = trial.evaluate(op.function, layout=layout)
    ran = op.calls - before
    require(bool(ran), "no operator ran")
    require({key.partition("/")[2] for key in ran} == {name}, f"{name} was asked for, {dict(ran)} ran")
    for key, value in results.items():
        shape, expected = tuple(value.shape), tuple(trial.peer[key].shape)
        require(shape == expected, f"{key} has shape {shape}, not {expected}")
        require(value.dtype == trial.peer[key].dtype, f"{key} is {value.dtype}, not {trial.peer[key].dtype}")
    deviations = trial.deviations({key: value.cpu() for key, value in results.items()})
    wrong = [str(deviation) for deviation in deviations if not deviation.acceptable]
    require(not wrong, "; ".join(wrong))
    return max((deviation.share for deviation in deviations), default=0.0)


def check_deterministic(op: Op, name: str, trial: Trial, layout: Layout = as_given) -> Results:
    """The same bits at every repeat, and for one thread and two. Returns the results."""
    with backend(**{op.name: name}):
        expected = trial.evaluate(op.function, layout=layout)
        for _ in range(3):
            require_same_bits(trial.evaluate(op.function, layout=layout), expected, "two runs differ")
        # The reference makes no promise about threads: torch's matrix product splits a long sum by their number.
        if name != "reference":
            with threads(1 if torch.get_num_threads() > 1 else 2):
                require_same_bits(trial.evaluate(op.function, layout=layout), expected, "1 and 2 threads differ")
    return expected


def check_writes_everything(
    op: Op, name: str, trial: Trial, layout: Layout = as_given, expected: Results | None = None
) -> None:
    """What is returned does not depend on what new memory held. expected: what the op returned before, if known."""
    with backend(**{op.name: name}):
        expected = expected or trial.evaluate(op.function, layout=layout)
        with PoisonedMemory():
            poisoned = trial.evaluate(op.function, layout=layout)
    require_same_bits(poisoned, expected, "memory that was never written was read or returned")


def require_same_bits(results: Results, expected: Results, message: str) -> None:
    for name, value in expected.items():
        found = results[name]
        same = torch.equal(found, value) or (  # where NaN is, equal() says no
            torch.equal(found.isnan(), value.isnan()) and torch.equal(found.nan_to_num(7.0), value.nan_to_num(7.0))
        )
        require(same, f"{name}: {message}")


class PoisonedMemory:
    """New tensors hold NaN (or the largest integer), from Python and from C++: the fill is in aten::empty itself."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True)
        assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        assert torch.empty(1000).isnan().all(), "the poison does not fire"

    def __exit__(self, *error: object) -> None:
        torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Proof:
    """All cases of one op on one back end."""

    op: str
    backend: str
    level: str  # instruction-set level of back end cpu, else the device
    cases: int  # case x dtype
    refused: int  # of them, those that the back end says it does not take
    worst: float  # largest error as a share of what is allowed, of the cases within it
    failures: tuple[str, ...]


def prove(op: Op, name: str, level: str, layout: Layout = as_given) -> Proof:
    """Put every case of the op in each of its dtypes through the checks above, on one back end. With one thread, but
    for the check that takes two: the cases are small, and several processes prove at once, whose threads would wait for
    one another (attention at level amx: 8 s of CPU time instead of 72)."""
    cases, refused, worst, failures = 0, 0, 0.0, []
    for case, dtype in ((each, dtype) for each in op.cases for dtype in each.dtypes):
        cases += 1
        trial = Trial(op, case, dtype)
        try:
            with threads(1):
                worst = max(worst, check_accuracy(op, name, trial, layout))
                expected = check_deterministic(op, name, trial, layout)
                check_writes_everything(op, name, trial, layout, expected)
        except BackendUnavailable:
            refused += 1
        except Refuted as failure:
            failures.append(f"{case.name}, {str(dtype).removeprefix('torch.')}: {failure}")
    return Proof(op.name, name, level, cases, refused, worst, tuple(failures))


def prove_all(ops: Sequence[Op]) -> list[Proof]:
    """Prove the ops on every back end that this machine has, and back end cpu at every level that it can run."""
    levels = _extension.usable_levels() if _extension.missing is None else []
    compiled = [op for op in ops if "cpu" in op.backends and op.refusal("cpu", "cpu") is None]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        at_levels = [pool.submit(_prove_at_level, compiled, level) for level in levels if compiled]
        proofs = [proof for op in ops for proof in _prove_here(op)]
        for running in at_levels:
            proofs += running.result()
    order = [op.name for op in ops]
    return sorted(proofs, key=lambda proof: order.index(proof.op))  # stable: back ends and levels stay in order


def _prove_here(op: Op) -> Iterator[Proof]:
    """The back ends that have no levels, on the CPU and on a GPU if there is one."""
    for name in op.backends:
        if name != "cpu" and op.refusal(name, "cpu") is None:
            yield prove(op, name, "cpu")
        if torch.cuda.is_available() and op.refusal(name, "cuda") is None:
            yield prove(op, name, "cuda", layout=Tensor.cuda)


def _prove_at_level(ops: Sequence[Op], level: str) -> list[Proof]:
    done = subprocess.run(
        [sys.executable, "-m", "warploom.ops._proof", *(op.name for op in ops)],
        capture_output=True,
        text=True,
        env={**os.environ, "WARPLOOM_CPU_LEVEL": level},
    )
    proofs = {}
    for line in done.stdout.splitlines():
        values = json.loads(line)
        proofs[values["op"]] = Proof(**{**values, "failures": tuple(values["failures"])})
    said = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
    died = f"its process ended with code {done.returncode} before this op was through: {said[0]}"
    return [proofs.get(op.name) or Proof(op.name, "cpu", level, 0, 0, 0.0, (died,)) for op in ops]


def main(names: Sequence[str]) -> None:
    level = _extension.level()
    for name in names:
        print(json.dumps(dataclasses.asdict(prove(REGISTRY[name], "cpu", level))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
