"""What the same bits on any number of replicas cost: a step with train.deterministic "elastic" against a usual one.

    python -m bench.elastic [--config small] [--dtype bf16] [--processes 1 2] [--steps 10] [--json FILE]

The same model, global batch and micro batches, on gloo processes of this machine with one thread each; the two kinds of
steps take turns. Their losses must agree within 1e-3, or the bench ends with exit code 1 and prints nothing of it.
On a machine that others use too, look at the processor time, of the slowest process; what it cannot show is waiting.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist
import tyro

from bench.harness import print_fingerprint, print_table, write_records
from bench.step import CASES, DTYPES
from warploom.models.transformer import Transformer
from warploom.nn.linear import keep_packed
from warploom.optim import AdamW
from warploom.parallel.apply import ParallelModel
from warploom.parallel.config import ParallelConfig
from warploom.parallel.mesh import Mesh, processes
from warploom.parallel.tree import TreeSum, step_seed
from warploom.train.allocator import keep_freed_memory
from warploom.train.step import ONE_PROCESS, Processes, training_step

_WARM_UP = 3  # rounds


def _step(config: str, dtype: torch.dtype, num_micro_batches: int, kind: str) -> Callable[[], float]:
    """Return what makes one step of a model of its own, of this process or of its part, and returns the loss."""
    case = CASES[config]
    torch.manual_seed(0)
    model = Transformer(case.model)
    model.compute_dtype = dtype
    tokens = torch.randint(case.model.vocab_size, (case.batch_size, case.seq_len + 1))
    whole = SimpleNamespace(tokens=tokens[:, :-1].contiguous(), targets=tokens[:, 1:].contiguous())
    rows = max(1, case.batch_size // num_micro_batches)
    pieces = zip(whole.tokens.split(rows), whole.targets.split(rows), strict=True)
    batches = [SimpleNamespace(tokens=x, targets=y) for x, y in pieces]
    mesh = Mesh(ParallelConfig(data=dist.get_world_size()), "cpu") if dist.is_initialized() else None
    parameters = list(model.parameters())
    loss_sum: Callable[..., Any] = functools.partial(model.loss, reduction="sum")
    how: Processes = ONE_PROCESS
    if kind == "elastic":
        how = TreeSum(parameters, lambda: step_seed(0, 0), None if mesh is None else mesh.axis["data"])
    elif mesh is not None:
        parallel = ParallelModel(model, mesh, rows)
        how, loss_sum, batches = parallel, parallel.loss_sum, [whole]
    optimizer = AdamW(parameters, lr=3e-4)
    optimizer.pack_into(keep_packed(model))

    def step() -> float:
        return training_step(loss_sum, batches, parameters, [optimizer], grad_clip=1.0, processes=how).loss

    return step


def work(options: Options) -> dict[str, Any]:
    """What one process finds."""
    keep_freed_memory()
    arguments = (options.config, DTYPES[options.dtype], options.micro_batches)
    steps = {kind: _step(*arguments, kind) for kind in ("layout", "elastic")}
    wall_s: dict[str, list[float]] = {kind: [] for kind in steps}
    cpu_s: dict[str, list[float]] = {kind: [] for kind in steps}
    losses: dict[str, list[float]] = {kind: [] for kind in steps}
    for number in range(_WARM_UP + options.steps):
        for kind in sorted(steps, reverse=number % 2 == 0):
            if dist.is_initialized():
                dist.barrier()
            started = time.perf_counter(), time.process_time()
            losses[kind].append(steps[kind]())
            wall_s[kind].append(time.perf_counter() - started[0])
            cpu_s[kind].append(time.process_time() - started[1])
    median = {
        f"{kind}_{what}": statistics.median(values[kind][_WARM_UP:])
        for what, values in (("s", wall_s), ("cpu_s", cpu_s))
        for kind in steps
    }
    return {"losses": losses, **median}


def bench(options: Options, n: int) -> dict[str, Any]:
    """Start n processes, and return what they found together."""
    with tempfile.TemporaryDirectory() as folder:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)] if n > 1 else []
        command = [sys.executable, *launch, "-m", "bench.elastic", "--worker", folder, "--steps", str(options.steps)]
        command += ["--config", options.config, "--dtype", options.dtype]
        command += ["--micro-batches", str(options.micro_batches)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            sys.exit(f"{n} processes ended with code {done.returncode}: {done.stderr[-2000:]}")
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(n)]
    layout, elastic = found[0]["losses"]["layout"], found[0]["losses"]["elastic"]
    if not all(abs(a - b) <= 1e-3 * abs(a) for a, b in zip(layout, elastic, strict=True)):
        sys.exit(f"on {n} processes the losses are {layout} and {elastic}, so nothing is printed")
    slowest = {name: max(one[name] for one in found) for name in found[0] if name != "losses"}
    return {"processes": n, **slowest}


@dataclass(frozen=True)
class Options:
    """Time steps whose gradients are summed in a tree against usual ones."""

    config: Literal["small", "gpt2"] = "small"
    dtype: Literal["bf16", "fp32"] = "bf16"
    processes: tuple[int, ...] = (1, 2)
    """Replicas; powers of two."""
    micro_batches: int = 4
    """Of a step, over all replicas."""
    steps: int = 10
    """Steps of each kind that are timed."""
    json: Path | None = None
    """Write the records here too."""
    worker: Path | None = None
    """Internal: be one of the processes, and write what it finds into this folder."""


def main(options: Options) -> None:
    if options.worker is not None:
        torch.set_num_threads(1)
        with processes("cpu") if "RANK" in os.environ else nullcontext():
            found = work(options)
            (options.worker / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
        return
    print_fingerprint()
    records = [bench(options, n) for n in options.processes]
    print_table(
        f"{options.config}, {options.dtype}, {options.micro_batches} micro batches",
        ("replicas", "layout ms", "elastic ms", "added", "layout CPU ms", "elastic CPU ms", "added"),
        [
            (
                str(record["processes"]),
                f"{record['layout_s'] * 1e3:,.1f}",
                f"{record['elastic_s'] * 1e3:,.1f}",
                f"{record['elastic_s'] / record['layout_s'] - 1:+.1%}",
                f"{record['layout_cpu_s'] * 1e3:,.1f}",
                f"{record['elastic_cpu_s'] * 1e3:,.1f}",
                f"{record['elastic_cpu_s'] / record['layout_cpu_s'] - 1:+.1%}",
            )
            for record in records
        ],
    )
    write_records(options.json, records)


if __name__ == "__main__":
    main(tyro.cli(Options))
