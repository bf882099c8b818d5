"""The whole training step, this engine against the same model in plain torch, eager and under torch.compile.

    python -m bench.step --config small gpt2 [--dtype bf16] [--json FILE]

One step is forward, loss, backward, clipping and fused AdamW on one fixed batch. The subjects start from the same
weights, each in a process of its own, and take turns. Before anything is timed their losses over a few steps must
agree, or the bench ends with an error and exit code 1.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from bench.harness import Ceiling, interleave, matmul_ceiling, print_fingerprint, print_table, write_records
from bench.plain_torch import plain_copy
from warploom.models.config import TransformerConfig
from warploom.models.presets import preset
from warploom.models.transformer import Transformer
from warploom.nn.linear import keep_packed
from warploom.optim import AdamW
from warploom.train.allocator import keep_freed_memory
from warploom.train.batches import Batch
from warploom.train.step import training_step

SUBJECTS = ("warploom", "torch-eager", "torch-compile")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LR = 3e-4
CHECKED_STEPS = 3
_CEILING_CALLS = 40
# Both sides round differently in every product. fp32 losses agree to about six digits; a bf16 product keeps eight bits,
# and over the layers of these models the mean loss of a batch moves by some 1e-3.
TOLERANCE = {"fp32": 2e-4, "bf16": 2e-2}


@dataclass(frozen=True)
class StepCase:
    """A model and a batch of (batch_size, seq_len) tokens."""

    model: TransformerConfig
    batch_size: int
    seq_len: int


_LEARNED = dict(position="learned", bias=True)
CASES = {
    # 6 layers of width 384, 6 heads, 8192 words, ReLU.
    "small": StepCase(replace(preset("small"), **_LEARNED), batch_size=16, seq_len=256),
    # 12 layers of width 768, 12 heads, 50304 words (a multiple of 64), GELU.
    "gpt2": StepCase(replace(preset("gpt2"), vocab_size=50304), batch_size=1, seq_len=1024),
}


@dataclass(frozen=True)
class _Batch:
    tokens: Tensor
    targets: Tensor


def build_step(subject: str, case: StepCase, dtype: torch.dtype) -> Callable[[], float]:
    """Return a function that makes one training step and returns its loss; every subject starts from the same state."""
    torch.manual_seed(0)
    model = Transformer(case.model)
    tokens = torch.randint(case.model.vocab_size, (case.batch_size, case.seq_len + 1))
    batch = _Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    if subject == "warploom":
        return _warploom_step(model, batch, dtype)
    plain = plain_copy(model)
    del model
    forward = torch.compile(plain) if subject == "torch-compile" else plain
    optimizer = torch.optim.AdamW(plain.parameters(), lr=LR, fused=True)
    parameters = list(plain.parameters())

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext():
            loss = forward(batch.tokens, batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def _warploom_step(model: Transformer, batch: Batch, dtype: torch.dtype) -> Callable[[], float]:
    model.compute_dtype = dtype
    packed = keep_packed(model)  # as the trainer does
    parameters = list(model.parameters())
    optimizer = AdamW(parameters, lr=LR)
    optimizer.pack_into(packed)

    def loss_sum(tokens: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
        return model.loss(tokens, targets, reduction="sum", **inputs)

    return lambda: training_step(loss_sum, [batch], parameters, [optimizer], grad_clip=1.0).loss


class Subject:
    """One subject in a process of its own, which makes a step when told to. So each keeps its own memory and its own
    settings of malloc, and what one does to the process is not done to the others."""

    def __init__(self, name: str, config: str, dtype: str, threads: int) -> None:
        command = [sys.executable, "-m", "bench.step", "--serve", name, "--config", config, "--dtype", dtype]
        self._process = subprocess.Popen(
            [*command, "--threads", str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def step(self) -> float:
        """Make one step and return its loss."""
        return self._ask("step")

    def peak_mb(self) -> float:
        """Peak resident memory so far, MB."""
        return self._ask("peak")

    def faults(self) -> float:
        """Median page faults of a step, those that were checked left out: by then memory has found its place."""
        return self._ask("faults")

    def close(self) -> None:
        self._process.communicate()

    def _ask(self, what: str) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit("a subject ended early; its message is above")
        return float(answer)


def serve(name: str, case: StepCase, dtype: torch.dtype) -> None:
    """Be a Subject's process: answer "step" with the loss of one step, "peak" with the peak memory in MB and "faults"
    with the median page faults of the steps."""
    if name == "warploom":
        keep_freed_memory()  # as the trainer does
    step = build_step(name, case, dtype)
    faults: list[int] = []

    def counted_step() -> float:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        loss = step()
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        return loss

    answers: dict[str, Callable[[], float]] = {
        "step": counted_step,
        "peak": lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "faults": lambda: statistics.median(faults[CHECKED_STEPS:]),
    }
    for line in sys.stdin:
        print(answers[line.strip()](), flush=True)


def check(losses: dict[str, list[float]], dtype: str) -> None:
    """Exit with code 1 unless every subject's losses are those of torch-eager, up to rounding."""
    expected = losses["torch-eager"]
    for subject, found in losses.items():
        off = [abs(a - b) for a, b in zip(found, expected, strict=True)]
        if not all(difference <= TOLERANCE[dtype] for difference in off):  # NaN is no smaller either
            sys.exit(f"{subject} is wrong, so nothing is timed: losses {found} differ from {expected} by {off}")


def _longer(ceiling: Ceiling) -> Ceiling:
    """The same, over a tenth of a second or so: threads of the subject before still spin for some milliseconds."""
    return Ceiling(lambda: [ceiling.call() for _ in range(_CEILING_CALLS)], ceiling.work * _CEILING_CALLS)


def bench(config: str, dtype: str, budget_s: float, threads: int) -> list[dict[str, Any]]:
    case = CASES[config]
    subjects = {name: Subject(name, config, dtype, threads) for name in SUBJECTS}
    check({name: [subject.step() for _ in range(CHECKED_STEPS)] for name, subject in subjects.items()}, dtype)
    ceiling = _longer(matmul_ceiling(DTYPES[dtype]))
    calls: dict[str, Callable[[], object]] = {name: subject.step for name, subject in subjects.items()}
    timings = interleave({**calls, "matmul": ceiling.call}, budget_s=budget_s, warmup_s=1.0)
    rate = ceiling.rate(timings["matmul"])
    with torch.device("meta"):
        flops_per_token = Transformer(case.model).flops_per_token(case.seq_len)
    tokens = case.batch_size * case.seq_len
    records = []
    for subject in SUBJECTS:
        step_s = timings[subject].median_s
        records.append(
            {
                "bench": "step",
                "config": config,
                "dtype": dtype,
                "subject": subject,
                "tokens_per_s": tokens / step_s,
                "step_ms": step_s * 1e3,
                "spread": timings[subject].spread,
                "peak_mb": subjects[subject].peak_mb(),
                "faults": subjects[subject].faults(),
                "mfu_measured": flops_per_token * tokens / step_s / rate,
                "matmul_gflops": rate / 1e9,
                "ratio": timings["torch-eager"].median_s / step_s,
            }
        )
    for subject in subjects.values():
        subject.close()
    return records


@dataclass(frozen=True)
class Arguments:
    """Time the whole training step against plain torch."""

    config: tuple[Literal["small", "gpt2"], ...] = ("small",)
    """Which configurations."""
    dtype: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """Compute types; plain torch uses autocast for bf16."""
    budget_s: float = 30.0
    """Seconds of timing per configuration and dtype, all subjects together; at least five rounds are made."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    json: Path | None = None
    """Write the records there as JSON."""
    serve: Literal["warploom", "torch-eager", "torch-compile"] | None = None
    """Be the process of one subject; for this bench's own use."""


def main(arguments: Arguments) -> None:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.serve is not None:
        serve(arguments.serve, CASES[arguments.config[0]], DTYPES[arguments.dtype[0]])
        return
    print_fingerprint()
    records = []
    for config in arguments.config:
        for dtype in arguments.dtype:
            records += bench(config, dtype, arguments.budget_s, arguments.threads)
            show(records[-len(SUBJECTS) :])
            write_records(arguments.json, records)


def show(records: list[dict[str, Any]]) -> None:
    print_table(
        "ratio: torch-eager's time over this one's; share: of the matrix rate measured in this run; faults: of pages, "
        "per step",
        ("config", "dtype", "subject", "tokens/s", "ms/step", "spread", "ratio", "share", "peak MB", "faults"),
        [
            (
                *(record[name] for name in ("config", "dtype", "subject")),
                f"{record['tokens_per_s']:,.0f}",
                f"{record['step_ms']:.1f}",
                f"{record['spread']:.0%}",
                f"{record['ratio']:.2f}x",
                f"{record['mfu_measured']:.2f}",
                f"{record['peak_mb']:,.0f}",
                f"{record['faults']:,.0f}",
            )
            for record in records
        ],
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
