"""What bench.gpu checks before it times: every op on the card against float64, inside a CUDA graph, and under
compute-sanitizer; and how long a first step takes with kernels compiled anew and with kernels on disk.

    python -m bench.gpu_checks [--cases N]     the accuracy checks alone, N cases an op: what the sanitizer runs
    python -m bench.gpu_checks --first-step    seconds from the start of the process to the end of a first step
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

STARTED = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "kernels")]  # the checkout may not be installed

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.gpu_work import forced, gpu_backends  # noqa: E402
from warploom.ops import REGISTRY  # noqa: E402
from warploom.ops._accuracy import Trial  # noqa: E402
from warploom.ops._op import BackendUnavailable  # noqa: E402
from warploom.ops._proof import Refuted, check_accuracy  # noqa: E402


def accuracy(name: str, until: float, most: int | None = None) -> Iterator[str]:
    """Every case (at most `most` of them) in every dtype on every back end of this card, until the time is up. Yields
    what is wrong; prints a line for each back end."""
    op = REGISTRY[name]
    for back_end in gpu_backends(name):
        done, refused, wrong, left = 0, 0, 0, 0
        for case in op.cases[:most]:
            for dtype in case.dtypes:
                if time.monotonic() > until:
                    left += 1
                    continue
                try:
                    check_accuracy(op, back_end, Trial(op, case, dtype), layout=Tensor.cuda)
                    done += 1
                except BackendUnavailable:
                    refused += 1
                except Refuted as refuted:
                    wrong += 1
                    yield f"{name} on {back_end}, {case.name}, {dtype}: {refuted}"
                except Exception as error:  # does not compile or launch: so may the next, and other back ends do not
                    wrong += 1
                    traceback.print_exc()
                    yield f"{name} on {back_end}, {case.name}, {dtype}: {type(error).__name__}: {error}"
        print(
            f"check {name} {back_end}: {done} right, {wrong} wrong, {refused} refused, {left} not reached in the time",
            flush=True,
        )


def graph_trials(name: str) -> Iterator[Trial]:
    """Cases of the op that compute something, the smallest first, each in every dtype: one of them every back end
    takes."""
    op = REGISTRY[name]
    for case in sorted(op.cases, key=lambda case: not case.gradcheck):
        for dtype in case.dtypes:
            trial = Trial(op, case, dtype)
            if all(value.numel() for value in trial.inputs.values() if isinstance(value, Tensor)):
                yield trial


def graph(name: str, back_end: str, trial: Trial) -> str | None:
    """Capture the op's forward and backward in a CUDA graph, replay it on other inputs, and compare with running it.
    Returns what is wrong, None if nothing is."""
    op = REGISTRY[name]
    arguments = {
        key: value.detach().cuda().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor)
        else [each.cuda() for each in value]
        if isinstance(value, list)
        else value
        for key, value in trial.arguments().items()
    }
    leaves = [arguments[key] for key in trial.differentiable] if op.differentiable else []

    def run() -> list[Tensor]:
        returned = op.function(**arguments)
        outputs = list(returned) if isinstance(returned, tuple) else [returned]
        gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs]) if leaves else ()
        return [*outputs, *gradients]

    call = forced(name, back_end, run)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles, and fills tables that are kept
            call()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        kept: list[Tensor] = call()  # type: ignore[assignment]
    with torch.no_grad():
        for value in arguments.values():
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, Tensor) and each.is_floating_point():
                    each.mul_(0.5)
    captured.replay()
    replayed = [tensor.clone() for tensor in kept]
    expected: list[Tensor] = call()  # type: ignore[assignment]
    same = all(torch.equal(a, b) for a, b in zip(replayed, expected, strict=True))
    return None if same else f"{name} on {back_end}: a replayed CUDA graph gives other results than running it"


def graphs() -> Iterator[str]:
    """Check every op and back end on the first of its cases that the back end takes. Yields what is wrong."""
    done = []
    for name, op in sorted(REGISTRY.items()):
        if op.mutates:  # a replay would start from what the capture left
            continue
        for back_end in gpu_backends(name):
            for trial in graph_trials(name):
                try:
                    wrong = graph(name, back_end, trial)
                except BackendUnavailable:
                    continue
                done.append(f"{name} {back_end}")
                if wrong is not None:
                    yield wrong
                break
            else:
                yield f"{name} on {back_end}: it refuses every case, and none was captured in a CUDA graph"
    print(f"CUDA graphs: {', '.join(done)}", flush=True)


def sanitizer(timeout_s: float, cases: int = 2) -> str | None:
    """Run the accuracy checks of a few cases under compute-sanitizer. Returns what is wrong, None if nothing is."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not installed: not run", flush=True)
        return None
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "bench.gpu_checks"]
    # With torch's cache an overrun lands in a block of the cache, and passes.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            [*command, "--cases", str(cases)], cwd=ROOT, env=environment, capture_output=True, text=True,
            timeout=timeout_s,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        print(f"compute-sanitizer: not through in {timeout_s:.0f} s", flush=True)
        return None
    last = (done.stdout + done.stderr).strip().splitlines()[-12:]
    print("compute-sanitizer:", "clean" if done.returncode == 0 else "\n".join(last), flush=True)
    return None if done.returncode == 0 else f"compute-sanitizer: exit code {done.returncode}"


def first_steps(timeout_s: float) -> dict[str, float]:
    """Seconds from the start of a process to the end of its first training step: with nothing compiled on disk, and
    again with what that left there."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("cold", "warm"):
            done = subprocess.run(
                [sys.executable, "-m", "bench.gpu_checks", "--first-step"], cwd=ROOT, check=True, timeout=timeout_s,
                env={**os.environ, "TRITON_CACHE_DIR": folder}, capture_output=True, text=True,
            )  # fmt: skip
            seconds[kind] = float(done.stdout.split()[-1])
    return seconds


def first_step() -> float:
    from warploom.models.presets import preset
    from warploom.models.transformer import Transformer
    from warploom.optim import AdamW

    model = Transformer(preset("gpt2")).cuda()
    model.compute_dtype = torch.bfloat16
    optimizer = AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(preset("gpt2").vocab_size, (4, 1025), device="cuda")
    model.loss(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), reduction="mean").backward()
    optimizer.step()
    torch.cuda.synchronize()
    return time.monotonic() - STARTED


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu_checks", description=__doc__)
    parser.add_argument("--cases", type=int, help="at most so many cases of each op")
    parser.add_argument("--first-step", action="store_true", help="time a first training step instead")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.gpu_checks: there is no NVIDIA GPU that torch can use", file=sys.stderr)
        return 2
    if arguments.first_step:
        print(f"{first_step():.2f}")
        return 0
    wrong = [each for name in sorted(REGISTRY) for each in accuracy(name, float("inf"), arguments.cases)]
    for each in wrong:
        print(f"FAILED: {each}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
