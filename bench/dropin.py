"""The training step of transformers' own OPT and GPT-2, as they are and with warploom patched in.

    python -m bench.dropin [--model opt gpt2] [--dtype bf16] [--quick] [--json FILE]

The models are built from configurations, with random weights and no download; dropout is 0, so that both sides compute
the same numbers. One step is forward with labels, backward, clipping and fused AdamW on one fixed batch, under torch's
autocast for bf16. The subjects start from the same weights, each in a process of its own, and take turns. Before
anything is timed their losses over a few steps must agree, or the bench ends with an error and exit code 1.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import nn

from bench.harness import interleave, print_fingerprint, print_table, write_records
from bench.step import CHECKED_STEPS, DTYPES, LR, TOLERANCE, Subject
from warploom.patch import patch

SUBJECTS = ("transformers", "patched")


@dataclass(frozen=True)
class DropinCase:
    """A causal language model of transformers and a batch of (batch_size, seq_len) tokens."""

    family: str
    config: dict[str, Any]
    batch_size: int
    seq_len: int


_OPT = dict(dropout=0.0, attention_dropout=0.0)
_GPT2 = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, loss_type="ForCausalLM")
CASES = {
    # transformers' defaults are the smallest published models: 12 layers of width 768, 12 heads; 50272 and 50257 words.
    "opt": DropinCase("OPT", _OPT, batch_size=1, seq_len=1024),
    "gpt2": DropinCase("GPT2", _GPT2, batch_size=1, seq_len=1024),
}
_QUICK_OPT = dict(hidden_size=256, word_embed_proj_dim=256, ffn_dim=1024, num_hidden_layers=4, num_attention_heads=4)
_QUICK_GPT2 = dict(n_embd=256, n_layer=4, n_head=4)
QUICK_CASES = {
    "opt": DropinCase("OPT", _OPT | _QUICK_OPT | dict(vocab_size=8192), batch_size=4, seq_len=256),
    "gpt2": DropinCase("GPT2", _GPT2 | _QUICK_GPT2 | dict(vocab_size=8192), batch_size=4, seq_len=256),
}


def build_model(case: DropinCase) -> nn.Module:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    head = {"OPT": "OPTForCausalLM", "GPT2": "GPT2LMHeadModel"}[case.family]
    torch.manual_seed(0)
    return getattr(transformers, head)(getattr(transformers, f"{case.family}Config")(**case.config)).train()


def build_step(subject: str, case: DropinCase, dtype: torch.dtype) -> Callable[[], float]:
    """Return a function that makes one training step and returns its loss; every subject starts from the same state."""
    model = build_model(case)
    if subject == "patched":
        print(patch(model), file=sys.stderr)
    tokens = torch.randint(model.config.vocab_size, (case.batch_size, case.seq_len))
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, fused=True)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext():
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


class DropinSubject(Subject):
    """A subject of this bench in a process of its own."""

    def __init__(self, name: str, model: str, dtype: str, threads: int, quick: bool) -> None:
        command = [sys.executable, "-m", "bench.dropin", "--serve", name, "--model", model, "--dtype", dtype]
        command += ["--threads", str(threads), "--quick" if quick else "--no-quick"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def serve(step: Callable[[], float]) -> None:
    """Be a subject's process: answer "step" with the loss of one step and "peak" with the peak memory in MB."""
    for line in sys.stdin:
        is_step = line.strip() == "step"
        print(step() if is_step else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, flush=True)


def check(losses: dict[str, list[float]], dtype: str) -> None:
    """Exit with code 1 unless the losses of both subjects are the same up to rounding."""
    if not all(abs(a - b) <= TOLERANCE[dtype] for a, b in zip(*losses.values(), strict=True)):
        sys.exit(f"the patched model is wrong, so nothing is timed: {losses}")


def bench(model: str, dtype: str, arguments: Arguments) -> list[dict[str, Any]]:
    case = (QUICK_CASES if arguments.quick else CASES)[model]
    subjects = {name: DropinSubject(name, model, dtype, arguments.threads, arguments.quick) for name in SUBJECTS}
    check({name: [subject.step() for _ in range(CHECKED_STEPS)] for name, subject in subjects.items()}, dtype)
    calls: dict[str, Callable[[], object]] = {name: subject.step for name, subject in subjects.items()}
    timings = interleave(calls, budget_s=arguments.budget_s, warmup_s=1.0)
    records = [
        {
            "bench": "dropin",
            "model": model,
            "quick": arguments.quick,
            "dtype": dtype,
            "subject": name,
            "tokens_per_s": case.batch_size * case.seq_len / timings[name].median_s,
            "step_ms": timings[name].median_s * 1e3,
            "spread": timings[name].spread,
            "peak_mb": subject.peak_mb(),
            "ratio": timings["transformers"].median_s / timings[name].median_s,
        }
        for name, subject in subjects.items()
    ]
    for subject in subjects.values():
        subject.close()
    return records


@dataclass(frozen=True)
class Arguments:
    """Time the training step of transformers' models, as they are and patched."""

    model: tuple[Literal["opt", "gpt2"], ...] = ("opt", "gpt2")
    """Which models."""
    dtype: tuple[Literal["fp32", "bf16"], ...] = ("bf16",)
    """Compute types; bf16 is torch's autocast."""
    quick: bool = False
    """Small models: 4 layers of width 256, 8192 words."""
    budget_s: float = 30.0
    """Seconds of timing per model and dtype, both subjects together; at least five rounds are made."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    json: Path | None = None
    """Write the records there as JSON."""
    serve: Literal["transformers", "patched"] | None = None
    """Be the process of one subject; for this bench's own use."""


def main(arguments: Arguments) -> None:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.serve is not None:
        case = (QUICK_CASES if arguments.quick else CASES)[arguments.model[0]]
        serve(build_step(arguments.serve, case, DTYPES[arguments.dtype[0]]))
        return
    print_fingerprint()
    records = []
    for model in arguments.model:
        for dtype in arguments.dtype:
            records += bench(model, dtype, arguments)
            show(records[-len(SUBJECTS) :])
            write_records(arguments.json, records)


def show(records: list[dict[str, Any]]) -> None:
    print_table(
        "ratio: the time of transformers as it is over this one's",
        ("model", "dtype", "subject", "tokens/s", "ms/step", "spread", "ratio", "peak MB"),
        [
            (
                *(record[name] for name in ("model", "dtype", "subject")),
                f"{record['tokens_per_s']:,.0f}",
                f"{record['step_ms']:.1f}",
                f"{record['spread']:.0%}",
                f"{record['ratio']:.2f}x",
                f"{record['peak_mb']:,.0f}",
            )
            for record in records
        ],
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
