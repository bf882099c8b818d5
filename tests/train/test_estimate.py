"""The memory estimate against the peak of real training steps, measured in a process of its own."""

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

from warploom.models.config import TransformerConfig
from warploom.models.presets import preset
from warploom.models.transformer import Transformer
from warploom.optim import OptimizerConfig
from warploom.train.estimate import estimate

# Prints, per case, the peak of the resident set over two steps, above what it was before the model was built.
MEASURE = """
import gc, json, sys, threading
import psutil, torch
from warploom.models.config import TransformerConfig
from warploom.models.transformer import Transformer
from warploom.nn.linear import keep_packed
from warploom.optim import OptimizerConfig, build_optimizers

def train(model, dtype, batch, seq_len, optimizer, checkpointing):
    config = TransformerConfig(**model)
    model = Transformer(config)
    model.compute_dtype = getattr(torch, dtype)
    model.gradient_checkpointing = checkpointing
    packed = keep_packed(model)  # as the trainer does
    optimizers = build_optimizers(model, OptimizerConfig(name=optimizer), muon_dtype=model.compute_dtype, packed=packed)
    tokens = torch.randint(config.vocab_size, (batch, seq_len))
    for _ in range(2):
        model.loss(tokens, tokens).backward()
        for one in optimizers:
            one.step()
        model.zero_grad(set_to_none=False)

def peak_of(case):
    gc.collect()
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss
    def sample():
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, process.memory_info().rss)
    sampler = threading.Thread(target=sample)
    sampler.start()
    train(**case)
    done.set()
    sampler.join()
    return peak - before

torch.set_num_threads(1)
cases = json.loads(sys.argv[1])
small = {"vocab_size": 64, "d_model": 64, "num_layers": 1, "num_heads": 1}
for case in cases:  # code and buffers that are made once and belong to no model
    train(**{**case, "model": {**case["model"], **small}, "batch": 1})
print(json.dumps([peak_of(case) for case in cases]))
"""

MODEL = {"vocab_size": 2048, "d_model": 256, "num_layers": 4, "num_heads": 4, "activation": "relu2", "norm": "rms_norm"}
USUAL = {"model": MODEL, "dtype": "float32", "batch": 8, "seq_len": 256, "optimizer": "muon", "checkpointing": False}
CASES = {
    "activations": USUAL,
    "bf16": {**USUAL, "dtype": "bfloat16"},
    "dropout": {**USUAL, "model": {**MODEL, "dropout": 0.1}},
    "swiglu": {**USUAL, "model": {**MODEL, "activation": "swiglu"}},
    "checkpointing": {**USUAL, "model": {**MODEL, "num_layers": 8}, "checkpointing": True},
    "weights": {**USUAL, "model": {**MODEL, "d_model": 512}, "optimizer": "adamw", "batch": 1},
}


def reckon(model, dtype, batch, seq_len, optimizer, checkpointing):
    return estimate(
        TransformerConfig(**model),
        seq_len=seq_len,
        micro_batch_size=batch,
        dtype=getattr(torch, dtype),
        optimizer=OptimizerConfig(name=optimizer),
        grad_checkpointing=checkpointing,
    )


@pytest.fixture(scope="module")
def peaks():
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("without glibc's MALLOC_MMAP_THRESHOLD_ the resident set says nothing of what tensors need")
    # malloc keeps freed blocks, so the resident set would show them too; with this, each large one goes back at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", MEASURE, json.dumps(list(CASES.values()))]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return dict(zip(CASES, json.loads(run.stdout), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_near_the_measured_peak(name, peaks):
    assert reckon(**CASES[name]).total_bytes == pytest.approx(peaks[name], rel=0.2)


def test_parameters_and_flops_are_the_models():
    config = TransformerConfig(**MODEL)
    model, cost = Transformer(config), reckon(**USUAL)
    assert cost.num_parameters == sum(p.numel() for p in model.parameters())
    assert cost.flops_per_token == model.flops_per_token(256)
    assert cost.weights_bytes == cost.gradients_bytes == 4 * cost.num_parameters


def test_moments_are_counted_per_optimizer():
    hidden = sum(p.numel() for n, p in Transformer(TransformerConfig(**MODEL)).named_parameters() if "_proj" in n)
    muon, adamw = reckon(**USUAL), reckon(**{**USUAL, "optimizer": "adamw"})
    assert adamw.optimizer_bytes == 8 * adamw.num_parameters
    assert muon.optimizer_bytes == adamw.optimizer_bytes - 4 * hidden


def test_cross_attention_and_the_encoder_count():
    both = {**MODEL, "architecture": "encoder-decoder"}
    assert reckon(**{**USUAL, "model": both}).activations_bytes > 2 * reckon(**USUAL).activations_bytes


def test_the_largest_presets_cost_no_memory_to_estimate():
    cost = estimate(
        preset("gpt3-175b"),
        seq_len=2048,
        micro_batch_size=1,
        dtype=torch.bfloat16,
        optimizer=OptimizerConfig(name="adamw"),
    )
    assert cost.weights_bytes + cost.gradients_bytes + cost.optimizer_bytes == 16 * cost.num_parameters
    assert cost.num_parameters > 170e9
