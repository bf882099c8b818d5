"""Every op against what a torch user would write, on the bench cases of the ops' own records.

    python -m bench.ops [--op NAME ...] [--dtype bf16] [--quick] [--memory] [--json FILE]

Before anything is timed, outputs and gradients must pass the error rule of the contract tests; an op that does not ends
the bench with exit code 1. ratio is torch's time over this subject's. share is the time of the matrix products, or of
the copying, that no implementation can avoid, at the rate measured in the same rounds, over the time taken. extra MB,
with --memory, is what a forward and a backward pass take resident at their peak beside arguments and results, in a
process of its own.
"""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from bench.harness import (
    Ceiling,
    copy_ceiling,
    interleave,
    matmul_ceiling,
    print_fingerprint,
    print_table,
    write_records,
)
from warploom.errors import UserError, nearest
from warploom.ops import REGISTRY, Op
from warploom.ops._accuracy import Trial, as_tuple
from warploom.ops._op import BenchCase
from warploom.train.allocator import keep_freed_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Pass:
    """One direction of one case: a call per subject, and the work that none of them can avoid."""

    direction: str
    calls: dict[str, Callable[[], object]]
    flops: int
    bytes: int


def passes(op: Op, case: BenchCase, dtype: torch.dtype) -> Iterator[Pass]:
    """The forward without gradients, then the backward alone; both together where they cannot be told apart. An op that
    is not differentiable has the forward only; one that changes its arguments goes on from what it has made of them."""
    trial = Trial(op, case, dtype, draws=1)
    wrong = [str(deviation) for deviation in trial.deviations(trial.evaluate(op.function)) if not deviation.acceptable]
    if wrong:
        sys.exit(f"{op.name} {case.name} {dtype} is wrong, so nothing is timed: {'; '.join(wrong)}")
    arguments = trial.arguments()
    functions = {"warploom": op.function, "torch": op.torch_peer}
    size = dtype.itemsize
    leaves = [arguments[name] for name in trial.differentiable]

    def forward(function: Callable[..., Any]) -> Callable[[], object]:
        return torch.no_grad()(lambda: function(**arguments))

    def both(function: Callable[..., Any]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(**arguments), leaves)

    def backward(function: Callable[..., Any]) -> Callable[[], object]:
        outputs = as_tuple(function(**arguments))
        gradients = [dy.to(y) for dy, y in zip(trial.output_gradients(outputs), outputs, strict=True)]
        return lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)

    flops, elements = case.flops, case.bytes_per_element
    yield Pass("forward", {name: forward(f) for name, f in functions.items()}, flops, elements * size)
    if not op.differentiable:
        return
    flops, elements = case.backward_flops, case.backward_bytes_per_element
    if case.backward_in_forward:
        flops, elements = flops + case.flops, elements + case.bytes_per_element
        yield Pass("forward+backward", {name: both(f) for name, f in functions.items()}, flops, elements * size)
    else:
        yield Pass("backward", {name: backward(f) for name, f in functions.items()}, flops, elements * size)


def bench(op: Op, case: BenchCase, dtype_name: str, budget_s: float) -> Iterator[dict[str, Any]]:
    dtype = DTYPES[dtype_name]
    for timed in passes(op, case, dtype):
        ceilings: dict[str, Ceiling] = {"copy": copy_ceiling()}
        if timed.flops:
            ceilings["matmul"] = matmul_ceiling(dtype)
        subjects = {**timed.calls, **{name: ceiling.call for name, ceiling in ceilings.items()}}
        timings = interleave(subjects, budget_s=budget_s, warmup_s=min(0.2, budget_s / 5))
        rates = {name: ceiling.rate(timings[name]) for name, ceiling in ceilings.items()}
        unavoidable_s = max(timed.bytes / rates["copy"], timed.flops / rates["matmul"] if timed.flops else 0.0)
        for subject in timed.calls:
            timing = timings[subject]
            yield {
                "bench": "ops",
                "op": op.name,
                "shape": case.name,
                "direction": timed.direction,
                "dtype": dtype_name,
                "subject": subject,
                "back_end": op.choice("cpu") if subject == "warploom" else None,
                "ms": timing.median_s * 1e3,
                "min_ms": timing.min_s * 1e3,
                "spread": timing.spread,
                "ratio": timings["torch"].median_s / timing.median_s,
                "share_of_ceiling": unavoidable_s / timing.median_s,
                "copy_gb_per_s": rates["copy"] / 1e9,
                "matmul_gflops": rates["matmul"] / 1e9 if timed.flops else None,
            }


def extra_bytes(op: Op, case: BenchCase, dtype_name: str, subject: str) -> int:
    """The memory of one forward and backward pass beside arguments and results, measured in a process of its own."""
    command = [sys.executable, "-m", "bench.ops", "--op", op.name, "--dtype", dtype_name]
    command += ["--memory-of", case.name, subject, "--threads", str(torch.get_num_threads())]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure_extra_bytes(op: Op, case: BenchCase, dtype: torch.dtype, subject: str) -> int:
    """extra_bytes in this process, whose allocator must be as the system has it: kept memory would hide new needs."""
    function = op.function if subject == "warploom" else op.torch_peer
    Trial(op, next(small for small in op.cases if dtype in small.dtypes), dtype).evaluate(function)  # loads libraries
    trial = Trial(op, case, dtype, draws=1)
    arguments = trial.arguments()
    leaves = [arguments[name] for name in trial.differentiable]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, see proc(5)
    before = _resident_bytes("VmRSS")
    outputs = as_tuple(function(**arguments))
    gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs]) if leaves else ()
    results = sum(result.nbytes for result in (*outputs, *gradients) if isinstance(result, torch.Tensor))
    return _resident_bytes("VmHWM") - before - results


def _resident_bytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


@dataclass(frozen=True)
class Arguments:
    """Time every op, forward and backward, against plain torch."""

    op: tuple[str, ...] = ()
    """Which ops; none given means all."""
    dtype: tuple[str, ...] = ("fp32", "bf16")
    """fp32, bf16 or both."""
    quick: bool = False
    """Only the first shape of each op, and a tenth of the time."""
    budget_s: float = 2.0
    """Seconds of timing per shape, dtype and direction, all subjects together; at least five rounds are made."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    memory: bool = False
    """Measure too what a pass takes beside arguments and results. Linux only."""
    json: Path | None = None
    """Write the records there as JSON."""
    memory_of: tuple[str, str] | None = None
    """Internal: the shape and the subject whose memory is to be measured in this process."""


def main(arguments: Arguments) -> None:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    for name, known in [(op, REGISTRY) for op in arguments.op] + [(dtype, DTYPES) for dtype in arguments.dtype]:
        if name not in known:
            raise UserError(f"there is nothing called {name!r} to bench{nearest(name, known)}")
    if arguments.memory_of is not None:
        shape, subject = arguments.memory_of
        op = REGISTRY[arguments.op[0]]
        case = next(case for case in op.bench_cases if case.name == shape)
        print(measure_extra_bytes(op, case, DTYPES[arguments.dtype[0]], subject))
        return
    keep_freed_memory()  # for both sides, as in training: a page fault costs more than many a small op
    print_fingerprint()
    budget_s = arguments.budget_s / (10 if arguments.quick else 1)
    records = []
    for name in arguments.op or REGISTRY:
        op = REGISTRY[name]
        for case in op.bench_cases[: 1 if arguments.quick else None]:
            for dtype in arguments.dtype:
                records += bench(op, case, dtype, budget_s)
                if arguments.memory:
                    extra = {subject: extra_bytes(op, case, dtype, subject) for subject in ("warploom", "torch")}
                    for record in records[-2:]:  # of the last direction
                        record["extra_bytes"] = extra[record["subject"]]
    print_table(
        "ops (ratio: torch's time over this one's; share: of the ceiling measured in this run)",
        ("op", "shape", "direction", "dtype", "subject", "ms", "spread", "ratio", "share", "extra MB"),
        [
            (
                *(record[key] for key in ("op", "shape", "direction", "dtype")),
                record["subject"] + (f" ({record['back_end']})" if record["back_end"] else ""),
                f"{record['ms']:.3f}",
                f"{record['spread']:.0%}",
                f"{record['ratio']:.2f}x",
                f"{record['share_of_ceiling']:.2f}",
                f"{record['extra_bytes'] / 1e6:.1f}" if "extra_bytes" in record else "",
            )
            for record in records
        ],
    )
    write_records(arguments.json, records)


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments))
    except UserError as error:
        print(f"bench.ops: {error}", file=sys.stderr)
        sys.exit(2)
