"""bench.generate times what is right, and nothing else."""

import dataclasses

import pytest
import torch
from bench import generate

from warploom.models import Transformer, preset

pytest.importorskip("transformers")


def tiny(name):
    return dataclasses.replace(
        preset("gpt2"), vocab_size=101, d_model=32, num_layers=2, num_heads=2, d_ff=64, max_seq_len=128, init_std=0.2
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_both_subjects_have_a_row(dtype, monkeypatch):
    monkeypatch.setattr(generate, "preset", tiny)
    ours, theirs = generate.measure("gpt2", dtype, batch_size=2, budget_s=0.1)
    assert ours["subject"] == "warploom" and theirs["subject"] == "transformers"
    assert theirs["speedup"] == 1.0 and ours["tokens_per_s"] > 0
    assert ours["speedup"] == pytest.approx(ours["tokens_per_s"] / theirs["tokens_per_s"])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_another_model_is_not_timed(dtype):
    torch.manual_seed(0)
    model = Transformer(tiny("gpt2")).eval()
    other = generate.load_theirs(model, generate.DTYPES[dtype])
    prompts = torch.randint(101, (2, generate.PROMPT_TOKENS))
    generate.check(model, generate.DTYPES[dtype], other, prompts)
    with torch.no_grad():
        model.output_weight[:50] *= 1.5
    with pytest.raises(SystemExit, match="nothing is timed"):
        generate.check(model, generate.DTYPES[dtype], other, prompts)
