"""Every op and the training step on an NVIDIA card: one command that needs the checkout, torch, triton and nvcc alone.

    python -m bench.gpu [--budget-s 440] [--json FILE]

First the C++ and CUDA C++ kernels are compiled into the checkout, for this card alone, unless they are there; without
nvcc, setuptools or ninja that is said, and the others are measured. Then every op is checked on the card
(bench/gpu_checks.py): against float64, case by case, as the contract tests do on the CPU, inside a CUDA graph, and
under compute-sanitizer where that is installed. Then the training step and a first step are timed; then ops at the
shapes of real models (bench/gpu_work.py), each back end beside what torch and others offer, as a share of the card's
own matrix-product rate or copy bandwidth of the same minutes. A part that fails is printed and the rest goes on; the
exit code is 1 then. Parts that the budget does not reach are named.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "kernels")]  # the checkout may not be installed

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bench import gpu_checks  # noqa: E402
from bench.gpu_work import BF16, WORK, Call, Work, gpu_backends  # noqa: E402
from warploom.ops import REGISTRY, _extension  # noqa: E402


@dataclass
class Report:
    """What came out so far, and until when there is time."""

    deadline: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def part(self, name: str, run: Callable[[], object]) -> None:
        """Run a part; an error in it is kept and printed, and ends nothing else."""
        if time.monotonic() > self.deadline:
            self.left_out.append(name)
            return
        try:
            run()
        except Exception as error:
            self.failures.append(f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
            traceback.print_exc()


def built() -> bool:
    """Compile the extension for this card if it lacks what the card needs. Returns whether there is a new one."""
    reason = _extension.why_cuda_missing()
    if reason is None:
        return False
    major, minor = torch.cuda.get_device_capability()
    arch = {(8, 6): "86", (8, 9): "89", (9, 0): "90a"}.get((major, minor), f"{major}0")
    print(f"CUDA C++ kernels: {reason}; compiling them for sm_{arch}", flush=True)
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=ROOT,
        env={**os.environ, "WARPLOOM_CUDA_ARCHS": arch},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        print(
            "it failed, and they are left out:", *(done.stdout + done.stderr).splitlines()[-12:], sep="\n", flush=True
        )
        return False
    print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
    return True


# Timing.


def interleave(subjects: dict[str, Call], budget_s: float) -> dict[str, float]:
    """Median seconds of each, taking turns. Before each sample a block larger than the cache is written: inputs come
    from memory, and the card is behind the host, so that launches do not count."""
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    for call in subjects.values():
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    samples: dict[str, list[tuple[Any, Any]]] = {name: [] for name in subjects}
    started = time.monotonic()
    rounds = 0
    names = list(subjects)
    while rounds < 5 or (time.monotonic() - started < budget_s and rounds < 200):
        for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
            flush.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            subjects[name]()
            end.record()
            samples[name].append((begin, end))
        torch.cuda.synchronize()
        rounds += 1
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) / 1e3 for name, pairs in samples.items()}


def ceilings() -> dict[str, tuple[Call, float]]:
    """A call that comes near the card's limit, and its FLOP or bytes."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=BF16) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.randn(1 << 28, device="cuda", dtype=BF16)
    target = torch.empty_like(source)
    return {
        "ceiling: product": (lambda: torch.mm(a, b, out=product), 2.0 * 8192**3),
        "ceiling: copy": (lambda: target.copy_(source), 4.0 * source.numel()),
    }


def time_work(report: Report, work: Work, limits: dict[str, tuple[Call, float]], budget_s: float) -> None:
    ceiling = "ceiling: product" if work.flops else "ceiling: copy"
    limit, amount = limits[ceiling]
    times = interleave({**work.subjects, ceiling: limit}, budget_s)
    rate = amount / times[ceiling]
    peers = [times[name] for name in times if name.startswith("torch")]
    for name in work.subjects:
        report.rows.append(
            {
                "op": work.op,
                "shape": work.shape,
                "subject": name,
                "us": times[name] * 1e6,
                "tflops": work.flops / times[name] / 1e12 if work.flops else None,
                "share_of_ceiling": (work.flops or work.bytes) / times[name] / rate,
                "over_best_torch": min(peers) / times[name] if peers else None,
            }
        )
        print(format_row(report.rows[-1]), flush=True)


def time_step(report: Report) -> None:
    """GPT-2 124M, 8 x 1024 tokens, weights float32, products bf16."""
    from bench.plain_torch import plain_copy
    from warploom.models.presets import preset
    from warploom.models.transformer import Transformer
    from warploom.optim import AdamW

    B, T = 8, 1024
    torch.manual_seed(0)
    model = Transformer(preset("gpt2")).cuda()
    tokens = torch.randint(preset("gpt2").vocab_size, (B, T + 1), device="cuda")
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    plain = plain_copy(model)
    compiled = torch.compile(plain)
    model.compute_dtype = BF16
    own, theirs = AdamW(model.parameters(), lr=1e-4), torch.optim.AdamW(plain.parameters(), lr=1e-4, fused=True)

    def warploom() -> Tensor:
        loss = model.loss(inputs, targets, reduction="mean")
        loss.backward()
        own.step()
        own.zero_grad(set_to_none=True)
        return loss.detach()

    def other(forward: Callable[..., Any]) -> Call:
        def step() -> Tensor:
            with torch.autocast("cuda", BF16):
                loss = forward(inputs, targets)
            loss.backward()
            theirs.step()
            theirs.zero_grad(set_to_none=True)
            return loss.detach()

        return step

    subjects: dict[str, Call] = {"warploom": warploom, "torch": other(plain), "torch.compile": other(compiled)}
    first, second = float(warploom()), float(other(plain)())  # type: ignore[arg-type]
    if abs(first - second) > 2e-2:
        raise AssertionError(f"the first losses differ: {first} and {second}")
    times = interleave(subjects, 20.0)
    for name, seconds in times.items():
        best = min(times["torch"], times["torch.compile"])
        row = {"op": "training step", "shape": f"GPT-2 124M {B}x{T}", "subject": name, "us": seconds * 1e6}
        row |= {"tokens_per_s": B * T / seconds, "over_best_torch": best / seconds}
        report.rows.append(row)
        print(format_row(row), f"{row['tokens_per_s']:.0f} tokens/s", flush=True)


def time_first_steps(report: Report) -> None:
    for kind, seconds in gpu_checks.first_steps(120.0).items():
        report.rows.append(
            {"op": "first step", "shape": "GPT-2 124M 4x1024", "subject": f"warploom, {kind}", "us": seconds * 1e6}
        )
        print(format_row(report.rows[-1]), flush=True)


# Output.


def format_row(row: dict[str, Any]) -> str:
    def shown(key: str, form: str) -> str:
        value = row.get(key)
        return "" if value is None else form.format(value)

    return (
        f"{row['op']:<14} {row['shape']:<32} {row['subject']:<14} {row['us']:>10.1f} us "
        f"{shown('tflops', '{:.0f} TFLOP/s'):>13} {shown('share_of_ceiling', '{:.2f} of ceiling'):>16} "
        f"{shown('over_best_torch', '{:.2f}x best of torch'):>20}"
    )


def finish(report: Report, card: str, path: Path | None) -> int:
    """Print the table, what failed and what was left out; write the JSON. Returns the exit code."""
    print(f"\n{card}, torch {torch.__version__}")
    for row in report.rows:
        print(format_row(row))
    for what in report.left_out:
        print(f"no time left for: {what}")
    for what in report.failures:
        print(f"FAILED: {what}", file=sys.stderr)
    if path is not None:
        record = {"card": card, "torch": torch.__version__, "rows": report.rows}
        record |= {"failures": report.failures, "left_out": report.left_out}
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 1 if report.failures else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--budget-s", type=float, default=440.0, help="seconds for everything; parts beyond are named")
    parser.add_argument("--json", type=Path, help="write the records there")
    parser.add_argument("--no-build", action="store_true", help="take the compiled kernels as they are")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.gpu: there is no NVIDIA GPU that torch can use", file=sys.stderr)
        return 2
    started = time.monotonic()
    if not arguments.no_build and built():
        # A process that has asked for the old extension, or for none, cannot load the new one.
        left_s = arguments.budget_s - (time.monotonic() - started)
        into = ["--json", str(arguments.json.resolve())] if arguments.json is not None else []
        command = [sys.executable, "-m", "bench.gpu", "--no-build", "--budget-s", f"{left_s:.0f}", *into]
        return subprocess.call(command, cwd=ROOT)
    report = Report(deadline=started + arguments.budget_s)
    names = sorted(name for name in REGISTRY if gpu_backends(name))

    def check(name: str, until: float) -> None:
        report.failures += gpu_checks.accuracy(name, until)

    def time_all(make: Callable[[], Iterator[Work]]) -> None:
        for work in make():
            name = f"{work.op} {work.shape}"
            report.part(name, lambda work=work: time_work(report, work, limits, 1.0))

    for index, name in enumerate(names):  # checks may take three tenths, shared by the ops that are left
        left = started + 0.3 * arguments.budget_s - time.monotonic()
        until = time.monotonic() + max(left, 0.0) / (len(names) - index)
        report.part(f"check of {name}", lambda name=name, until=until: check(name, until))
    report.part("CUDA graphs", lambda: report.failures.extend(gpu_checks.graphs()))
    limits = ceilings()
    # Before the ops one by one: of all numbers these are the ones to have.
    report.part("training step", lambda: time_step(report))
    report.part("first step", lambda: time_first_steps(report))
    for kind, make in WORK.items():
        report.part(kind, lambda make=make: time_all(make))
    # Last, since it is slow, and what it does not reach it names.
    left = report.deadline - time.monotonic()
    if left > 20:
        report.part("compute-sanitizer", lambda: report.failures.extend(filter(None, [gpu_checks.sanitizer(left)])))
    else:
        report.left_out.append("compute-sanitizer")
    return finish(report, torch.cuda.get_device_name(), arguments.json)


if __name__ == "__main__":
    sys.exit(main())
