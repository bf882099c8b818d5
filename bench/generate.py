"""Writing text, a token at a time: warploom's sampler beside transformers' generate, on the same weights.

    python -m bench.generate [--config gpt2] [--dtype fp32 bf16] [--batch-size 1 8] [--budget-s 20] [--json FILE]

A model of random weights is exported and loaded by transformers; both read prompts of 64 tokens and add the likeliest
token 64 times, with their caches. Before anything is timed the texts must be the same in float32, and in bfloat16 our
logits may be off by twice what theirs are, and theirs by a twentieth of the largest.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

from bench.harness import interleave, print_fingerprint, print_table, write_records
from warploom.generate.distribution import SamplingConfig
from warploom.generate.sampler import row_generator, sample_tokens
from warploom.interchange.hugging_face import export_model
from warploom.models import Transformer, preset
from warploom.nn.linear import keep_packed

PROMPT_TOKENS, NEW_TOKENS = 64, 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def ours(model: Transformer, prompts: Tensor) -> Tensor:
    """(B, PROMPT_TOKENS) -> (B, NEW_TOKENS), the likeliest continuation."""
    drawn: list[list[int]] = []
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=NEW_TOKENS)

    def on_step(tokens: list[int]) -> bool:
        drawn.append(tokens)
        return False

    generators = [row_generator(0, row, 0) for row in range(len(prompts))]
    with torch.no_grad():
        sample_tokens(model, prompts.tolist(), sampling, generators, on_step)
    return torch.tensor(drawn).T


def theirs(model: Any, prompts: Tensor) -> Tensor:
    written = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return written[:, prompts.shape[1] :]


def load_theirs(model: Transformer, dtype: torch.dtype) -> nn.Module:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    with tempfile.TemporaryDirectory() as scratch:
        export_model(model, Path(scratch) / "model")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(Path(scratch) / "model", dtype=dtype)
    loaded.generation_config.eos_token_id = None
    model_of_theirs: nn.Module = loaded.eval()
    return model_of_theirs


def check(model: Transformer, dtype: torch.dtype, other: nn.Module, prompts: Tensor) -> None:
    model.compute_dtype = torch.float32
    text = ours(model, prompts)
    if dtype == torch.float32:
        if not torch.equal(text, theirs(other, prompts)):
            raise SystemExit("the two do not write the same text: wrong, so nothing is timed")
        return
    with torch.no_grad():
        tokens = torch.cat([prompts, text], dim=1)
        exact = model.logits(model(tokens))
        model.compute_dtype = dtype
        off = (model.logits(model(tokens).float()) - exact).abs().max().item()
        theirs_off = (other(tokens).logits.float() - exact).abs().max().item()
    if not off <= 2 * theirs_off or not theirs_off <= 0.05 * exact.abs().max():
        raise SystemExit(f"our logits are off by {off:.3g}, theirs by {theirs_off:.3g}: wrong, so nothing is timed")


def measure(name: str, dtype: str, batch_size: int, budget_s: float) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = Transformer(preset(name)).eval()
    keep_packed(model)
    prompts = torch.randint(model.config.vocab_size, (batch_size, PROMPT_TOKENS))
    other = load_theirs(model, DTYPES[dtype])
    check(model, DTYPES[dtype], other, prompts)
    model.compute_dtype = DTYPES[dtype]
    subjects: dict[str, Callable[[], object]] = {
        "warploom": lambda: ours(model, prompts),
        "transformers": lambda: theirs(other, prompts),
    }
    timings = interleave(subjects, budget_s=budget_s)
    return [
        {
            "bench": "generate",
            "config": name,
            "dtype": dtype,
            "batch_size": batch_size,
            "subject": subject,
            "tokens_per_s": batch_size * NEW_TOKENS / timings[subject].median_s,
            "speedup": timings["transformers"].median_s / timings[subject].median_s,
            "spread": timings[subject].spread,
        }
        for subject in subjects
    ]


@dataclass(frozen=True)
class Arguments:
    """Time the sampler beside transformers' generate, on the same weights."""

    config: tuple[str, ...] = ("gpt2",)
    """Presets, of those that transformers can express."""
    dtype: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    batch_size: tuple[int, ...] = (1, 8)
    """Texts written at once."""
    budget_s: float = 20.0
    """Seconds for each row of the table."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    json: Path | None = None
    """Write the records there as JSON."""


def main(arguments: Arguments) -> None:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print_fingerprint()
    records = [
        record
        for name in arguments.config
        for dtype in arguments.dtype
        for batch_size in arguments.batch_size
        for record in measure(name, dtype, batch_size, arguments.budget_s)
    ]
    print_table(
        f"prompts of {PROMPT_TOKENS} tokens, {NEW_TOKENS} more",
        ("config", "dtype", "rows", "", "tokens/s", "against transformers", "spread"),
        (
            (
                record["config"],
                record["dtype"],
                str(record["batch_size"]),
                record["subject"],
                f"{record['tokens_per_s']:.1f}",
                f"{record['speedup']:.2f}x",
                f"{record['spread']:.0%}",
            )
            for record in records
        ),
    )
    write_records(arguments.json, records)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
