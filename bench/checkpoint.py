"""Checkpoints: how long a save takes, and what it costs the steps.

    python -m bench.checkpoint [--config small] [--dtype bf16] [--every 100] [--folder DIR] [--json FILE]

save: seconds of save_checkpoint with all fsyncs, of the same without checksums, and of writing as many bytes to one
file with one fsync, taking turns. beside the training: steps are made, and every so many of them the state is saved in
the background as the trainer does it; stall is the time that a save held the steps up (waiting for the save before,
taking the copy), slower what the steps took longer while a thread wrote, both as shares of the time between two saves.
What was saved is loaded and compared, and the steps' losses, before anything is printed; else the exit code is 1.
"""

from __future__ import annotations

import functools
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import tyro
from torch import Tensor

from bench.harness import interleave, print_fingerprint, print_table, write_records
from bench.step import CASES, DTYPES
from warploom.checkpoint import CheckpointState, flatten_optimizer, load_checkpoint, save_checkpoint
from warploom.checkpoint.background import BackgroundSaver
from warploom.checkpoint.tensors import tensor_bytes
from warploom.models.transformer import Transformer
from warploom.nn.linear import keep_packed
from warploom.optim import AdamW
from warploom.train.allocator import keep_freed_memory
from warploom.train.step import training_step


@dataclass(frozen=True)
class _Batch:
    tokens: Tensor
    targets: Tensor


class Run:
    """A model in training on random tokens."""

    def __init__(self, config: str, dtype: torch.dtype) -> None:
        case = CASES[config]
        torch.manual_seed(0)
        self.model = Transformer(case.model)
        self.model.compute_dtype = dtype
        tokens = torch.randint(case.model.vocab_size, (case.batch_size, case.seq_len + 1))
        self._batch = _Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        self._parameters = list(self.model.parameters())
        self._optimizer = AdamW(self._parameters, lr=3e-4)
        self._optimizer.pack_into(keep_packed(self.model))
        self._loss_sum = functools.partial(self.model.loss, reduction="sum")
        self.num_steps = 0

    def step(self) -> float:
        self.num_steps += 1
        return training_step(self._loss_sum, [self._batch], self._parameters, [self._optimizer], grad_clip=1.0).loss

    def state(self) -> CheckpointState:
        tensors, values = flatten_optimizer(self._optimizer, self.model.named_parameters())
        return CheckpointState(self.num_steps, self.model.state_dict(), tensors, meta={"optimizer": values})


def bench_save(run: Run, folder: Path, budget_s: float) -> dict[str, Any]:
    state = run.state()
    tensors = [*state.weights.values(), *state.optimizer.values()]
    num_bytes = sum(tensor.nbytes for tensor in tensors)

    def one_file() -> None:
        path = folder / "plain"
        with open(path, "wb", buffering=0) as file:
            for tensor in tensors:
                file.write(tensor_bytes(tensor))
            os.fsync(file.fileno())
        path.unlink()

    def without_checksums() -> None:
        with mock.patch("warploom.checkpoint.save._digest", lambda data, file_digest: "0" * 32):
            save_checkpoint(folder / "plain-run", state)

    calls: dict[str, Callable[[], object]] = {
        "save": lambda: save_checkpoint(folder / "run", state),
        "one file, one fsync": one_file,
        "without": without_checksums,
    }
    timings = interleave(calls, budget_s=budget_s)
    _require_equal(run, folder / "run")
    save_s = timings["save"].median_s
    return {
        "bytes": num_bytes,
        "save_s": save_s,
        "save_mb_per_s": num_bytes / save_s / 1e6,
        "one_file_s": timings["one file, one fsync"].median_s,
        "checksums_added": save_s / timings["without"].median_s - 1,
        "spread": timings["save"].spread,
    }


def _require_equal(run: Run, run_dir: Path) -> None:
    state = run.state()
    found = load_checkpoint(run_dir / f"step-{state.step:08d}")
    pairs = ((state.weights, found.weights), (state.optimizer, found.optimizer))
    if not all(torch.equal(saved[name], read[name]) for saved, read in pairs for name in saved):
        sys.exit("what was saved is not what is read back, so nothing is printed")


def bench_beside(run: Run, folder: Path, every: int, num_saves: int) -> dict[str, Any]:
    run_dir = folder / "beside"
    saver = BackgroundSaver(lambda state: save_checkpoint(run_dir, state))
    stalls, times, written = [], [], []

    def save() -> None:
        started = time.perf_counter()
        saver.wait()
        saver.start(run.state())
        stalls.append(time.perf_counter() - started)

    save()  # the first pays for the copy's memory
    saver.wait()
    stalls.clear()
    began = time.perf_counter()
    for number in range(num_saves * every):
        if number % every == 0:
            save()
        is_writing = not saver.is_done
        started = time.perf_counter()
        run.step()
        times.append(time.perf_counter() - started)
        written.append(is_writing)
    interval_s = (time.perf_counter() - began) / num_saves
    saver.wait()
    saver.start(run.state())
    saver.wait()
    saver.finish()
    _require_equal(run, run_dir)
    quiet = [step_s for step_s, is_writing in zip(times, written, strict=True) if not is_writing]
    step_s = statistics.median(quiet or times)
    slower_s = sum(t - step_s for t, is_writing in zip(times, written, strict=True) if is_writing) / num_saves
    return {
        "step_s": step_s,
        "interval_s": interval_s,
        "stall_s": statistics.median(stalls),
        "stall_share": statistics.mean(stalls) / interval_s,
        "slower_share": slower_s / interval_s,
    }


@dataclass(frozen=True)
class Command:
    """Time checkpoints, and the steps beside them."""

    config: Literal["small", "gpt2"] = "small"
    dtype: Literal["bf16", "fp32"] = "bf16"
    every: int = 100
    """Steps between two saves."""
    saves: int = 2
    """Saves beside the training."""
    folder: Path | None = None
    """Where to write; None takes a temporary folder."""
    budget_s: float = 10.0
    """Seconds for each part whose subjects take turns."""
    json: Path | None = None

    def run(self) -> None:
        keep_freed_memory()
        print_fingerprint()
        folder = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=self.folder))
        try:
            run = Run(self.config, DTYPES[self.dtype])
            for _ in range(3):
                run.step()
            save = bench_save(run, folder, self.budget_s)
            beside = bench_beside(run, folder, self.every, self.saves)
        finally:
            shutil.rmtree(folder)
        print_table(
            f"save: {self.config}, {save['bytes'] / 1e6:,.0f} MB of weights and moments",
            ("", "s", "MB/s", "spread", "one file, one fsync: s", "checksums add"),
            [
                (
                    "save_checkpoint",
                    f"{save['save_s']:.3f}",
                    f"{save['save_mb_per_s']:,.0f}",
                    f"{save['spread']:.0%}",
                    f"{save['one_file_s']:.3f}",
                    f"{save['checksums_added']:+.1%}",
                )
            ],
        )
        print_table(
            f"beside the training: a save every {self.every} steps",
            ("", "step ms", "between saves s", "stall ms", "stall", "slower"),
            [
                (
                    f"{self.config} {self.dtype}",
                    f"{beside['step_s'] * 1e3:.1f}",
                    f"{beside['interval_s']:.1f}",
                    f"{beside['stall_s'] * 1e3:.1f}",
                    f"{beside['stall_share']:.2%}",
                    f"{beside['slower_share']:.2%}",
                )
            ],
        )
        parts = {"save": save, "beside": beside}
        write_records(self.json, [{"part": name, **part} for name, part in parts.items()])


if __name__ == "__main__":
    tyro.cli(Command).run()
