"""The whole training step, this engine against the same model in plain torch, eager and under torch.compile.

    python -m bench.step --config small gpt2 [--dtype bf16] [--json FILE]

One step is forward, loss, backward, clipping and fused AdamW on one fixed batch. The subjects start from the same
weights; before anything is timed their losses over a few steps must agree, or the bench ends with an error. Peak memory
is that of a process of its own per subject. Exit code 1 if a subject is wrong.
"""

from __future__ import annotations

import resource
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

from bench.harness import interleave, matmul_ceiling, print_fingerprint, print_table, write_records
from bench.plain_torch import plain_copy
from warploom.models.config import TransformerConfig
from warploom.models.presets import preset
from warploom.models.transformer import Transformer
from warploom.train.batches import Batch
from warploom.train.step import training_step

SUBJECTS = ("warploom", "torch-eager", "torch-compile")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LR = 3e-4
CHECKED_STEPS = 3
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
    parameters = list(model.parameters())
    optimizers = [torch.optim.AdamW(parameters, lr=LR, fused=True)]

    def loss_sum(tokens: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
        return model.loss(tokens, targets, reduction="sum", **inputs)

    return lambda: training_step(loss_sum, [batch], parameters, optimizers, grad_clip=1.0).loss


def check(losses: dict[str, list[float]], dtype: str) -> None:
    """Exit with code 1 unless every subject's losses are those of torch-eager, up to rounding."""
    expected = losses["torch-eager"]
    for subject, found in losses.items():
        worst = max(abs(a - b) for a, b in zip(found, expected, strict=True))
        if not worst <= TOLERANCE[dtype]:
            sys.exit(f"{subject} is wrong, so nothing is timed: losses {found} differ from {expected} by {worst:.2g}")


def peak_mb(subject: str, config: str, dtype: str) -> float:
    """Peak resident memory of a process that makes three steps, MB."""
    command = [sys.executable, "-m", "bench.step", "--config", config, "--dtype", dtype, "--peak-of", subject]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def bench(config: str, dtype: str, budget_s: float) -> list[dict[str, Any]]:
    case = CASES[config]
    steps = {subject: build_step(subject, case, DTYPES[dtype]) for subject in SUBJECTS}
    check({subject: [step() for _ in range(CHECKED_STEPS)] for subject, step in steps.items()}, dtype)
    ceiling = matmul_ceiling(DTYPES[dtype])
    timings = interleave({**steps, "matmul": ceiling.call}, budget_s=budget_s, warmup_s=1.0)
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
                "peak_mb": peak_mb(subject, config, dtype),
                "mfu_measured": flops_per_token * tokens / step_s / rate,
                "matmul_gflops": rate / 1e9,
                "ratio": timings["torch-eager"].median_s / step_s,
            }
        )
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
    peak_of: Literal["warploom", "torch-eager", "torch-compile"] | None = None
    """Only make three steps of this subject and print the peak memory, MB."""


def main(arguments: Arguments) -> None:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.peak_of is not None:
        step = build_step(arguments.peak_of, CASES[arguments.config[0]], DTYPES[arguments.dtype[0]])
        for _ in range(3):
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    print_fingerprint()
    records = []
    for config in arguments.config:
        for dtype in arguments.dtype:
            records += bench(config, dtype, arguments.budget_s)
            torch.compiler.reset()
    print_table(
        "training step (ratio: torch-eager's time over this one's; share: of the matrix rate measured in this run)",
        ("config", "dtype", "subject", "tokens/s", "ms/step", "spread", "ratio", "share", "peak MB"),
        [
            (
                *(record[name] for name in ("config", "dtype", "subject")),
                f"{record['tokens_per_s']:,.0f}",
                f"{record['step_ms']:.1f}",
                f"{record['spread']:.0%}",
                f"{record['ratio']:.2f}x",
                f"{record['mfu_measured']:.2f}",
                f"{record['peak_mb']:,.0f}",
            )
            for record in records
        ],
    )
    write_records(arguments.json, records)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
