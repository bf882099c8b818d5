"""The memory estimate against the peak of real training steps, measured in a process of its own."""

import json
import os
import subprocess
import sys

import pytest
import torch

from warploom.models.config import TransformerConfig
from warploom.models.presets import preset
from warploom.models.transformer import Transformer
from warploom.ops import _extension
from warploom.optim import OptimizerConfig
from warploom.train.estimate import estimate

# Prints the most that tensors have taken at one time, as the arena counted it, over steps of several micro batches.
MEASURE = """
import functools, json, sys
from types import SimpleNamespace
import torch
from warploom.models.config import TransformerConfig
from warploom.models.recompute import keep
from warploom.models.transformer import Transformer
from warploom.nn.linear import keep_packed
from warploom.optim import OptimizerConfig, build_optimizers
from warploom.train.allocator import keep_freed_memory
from warploom.train.estimate import KEPT
from warploom.train.step import training_step

torch.set_num_threads(1)
assert keep_freed_memory()
case = json.loads(sys.argv[1])
config = TransformerConfig(**case["model"])
model = Transformer(config)
model.compute_dtype = getattr(torch, case["dtype"])
keep(model, KEPT[case["checkpointing"]])
packed = keep_packed(model)  # as the trainer does
optimizer = OptimizerConfig(name=case["optimizer"])
optimizers = build_optimizers(model, optimizer, muon_dtype=model.compute_dtype, packed=packed)
tokens = torch.randint(config.vocab_size, (case["batch"], case["seq_len"]))
batch = SimpleNamespace(tokens=tokens, targets=tokens)
if config.architecture == "encoder-decoder":
    batch.source = tokens
loss_sum = functools.partial(model.loss, reduction="sum")
for _ in range(2):
    training_step(loss_sum, [batch] * case["micro_batches"], list(model.parameters()), optimizers, grad_clip=1.0)
print(torch.ops.warploom_cpu.arena_statistics()["peak_bytes"])
"""

MODEL = {"vocab_size": 2048, "d_model": 256, "num_layers": 4, "num_heads": 4, "activation": "relu2", "norm": "rms_norm"}
USUAL = {
    **{"model": MODEL, "dtype": "float32", "batch": 8, "seq_len": 256, "optimizer": "muon", "checkpointing": "none"},
    "micro_batches": 1,
}
CASES = {
    "muon": USUAL,
    "bf16": {**USUAL, "dtype": "bfloat16", "micro_batches": 2},
    "dropout": {**USUAL, "model": {**MODEL, "dropout": 0.1, "position": "learned", "bias": True}},
    "swiglu": {**USUAL, "model": {**MODEL, "activation": "swiglu", "num_kv_heads": 1}, "micro_batches": 2},
    "blocks": {**USUAL, "model": {**MODEL, "num_layers": 8}, "checkpointing": "blocks", "micro_batches": 2},
    "ops": {**USUAL, "model": {**MODEL, "activation": "gelu"}, "checkpointing": "ops", "dtype": "bfloat16"},
    "weights": {**USUAL, "model": {**MODEL, "d_model": 512}, "optimizer": "adamw", "batch": 1},
    "encoder_decoder": {
        **USUAL,
        "model": {**MODEL, "architecture": "encoder-decoder", "norm_position": "post", "tie_embeddings": False},
        "optimizer": "adamw",
    },
}


def reckon(model, dtype, batch, seq_len, optimizer, checkpointing, micro_batches):
    return estimate(
        TransformerConfig(**model),
        seq_len=seq_len,
        micro_batch_size=batch,
        dtype=getattr(torch, dtype),
        optimizer=OptimizerConfig(name=optimizer),
        grad_checkpointing=checkpointing,
        num_micro_batches=micro_batches,
    )


@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_near_the_measured_peak(name):
    if _extension.why_missing("arena_statistics") is not None:
        pytest.skip("without the compiled extension's arena nothing counts what tensors take")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", MEASURE, json.dumps(CASES[name])]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    assert reckon(**CASES[name]).peak_bytes == pytest.approx(int(run.stdout), rel=0.05)


def test_parameters_and_flops_are_the_models():
    config = TransformerConfig(**MODEL)
    model, cost = Transformer(config), reckon(**USUAL)
    assert cost.num_parameters == sum(p.numel() for p in model.parameters())
    assert cost.flops_per_token == model.flops_per_token(256)
    assert cost.weights_bytes == cost.gradients_bytes == 4 * cost.num_parameters


def test_moments_are_counted_per_optimizer():
    hidden = sum(p.numel() for n, p in Transformer(TransformerConfig(**MODEL)).named_parameters() if "_proj" in n)
    muon, adamw = reckon(**USUAL), reckon(**{**USUAL, "optimizer": "adamw"})
    # Beside the moments, a count of steps per parameter.
    assert adamw.optimizer_bytes == pytest.approx(8 * adamw.num_parameters, abs=1000)
    assert muon.optimizer_bytes == pytest.approx(adamw.optimizer_bytes - 4 * hidden, abs=1000)


def test_accumulated_gradients_are_there_when_the_next_micro_batch_peaks():
    once, twice = reckon(**USUAL), reckon(**{**USUAL, "micro_batches": 2})
    assert once.gradients_bytes / 2 < twice.peak_bytes - once.peak_bytes <= once.gradients_bytes


def test_what_is_not_kept_takes_no_memory():
    kept = {name: reckon(**{**USUAL, "checkpointing": name}) for name in ("none", "ops", "blocks")}
    assert kept["blocks"].activations_bytes < kept["ops"].activations_bytes < kept["none"].activations_bytes
    assert kept["blocks"].peak_bytes < kept["ops"].peak_bytes < kept["none"].peak_bytes


def test_the_largest_presets_cost_no_memory_to_estimate():
    cost = estimate(
        preset("gpt3-175b"),
        seq_len=2048,
        micro_batch_size=1,
        dtype=torch.bfloat16,
        optimizer=OptimizerConfig(name="adamw"),
    )
    states = cost.weights_bytes + cost.gradients_bytes + cost.optimizer_bytes
    assert states == pytest.approx(16 * cost.num_parameters, rel=1e-6)
    assert cost.num_parameters > 170e9
