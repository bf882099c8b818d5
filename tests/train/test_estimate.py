"""The memory estimate against the peak of real steps, measured in processes of their own."""

import json
import subprocess
import sys

import pytest
import torch

from warploom.models.config import TransformerConfig
from warploom.optim import OptimizerConfig
from warploom.train.estimate import estimate

# Peak resident set above what it was before the model was built, of two steps: the second has the optimizer's moments.
MEASURE = """
import json, sys, threading, time
import psutil, torch
from warploom.models.config import TransformerConfig
from warploom.models.transformer import Transformer
from warploom.optim import OptimizerConfig, build_optimizers
case = json.loads(sys.argv[1])
torch.set_num_threads(1)

def step(config, dtype, batch, seq_len, optimizer, checkpointing, steps):
    model = Transformer(config)
    model.compute_dtype = dtype
    model.gradient_checkpointing = checkpointing
    optimizers = build_optimizers(model, OptimizerConfig(name=optimizer), muon_dtype=dtype)
    tokens = torch.randint(config.vocab_size, (batch, seq_len))
    for _ in range(steps):
        model.loss(tokens, tokens).backward()
        for one in optimizers:
            one.step()
        model.zero_grad(set_to_none=False)

dtype = getattr(torch, case["dtype"])
# Code, thread pools and buffers that do not belong to the model.
step(TransformerConfig(vocab_size=64, d_model=64, num_layers=1, num_heads=1), dtype, 1, 64, case["optimizer"], False, 1)
process = psutil.Process()
before = peak = process.memory_info().rss
done = threading.Event()

def sample():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, process.memory_info().rss)

sampler = threading.Thread(target=sample)
sampler.start()
step(TransformerConfig(**case["model"]), dtype, case["batch"], case["seq_len"], case["optimizer"],
     case["checkpointing"], 2)
done.set()
sampler.join()
print(peak - before)
"""

MODEL = {"vocab_size": 2048, "d_model": 256, "num_layers": 4, "num_heads": 4, "activation": "relu2", "norm": "rms_norm"}
CASES = {
    "activations": {"model": MODEL, "dtype": "float32"},
    "bf16": {"model": MODEL, "dtype": "bfloat16"},
    "checkpointing": {"model": {**MODEL, "num_layers": 8}, "dtype": "float32", "checkpointing": True},
    "swiglu": {"model": {**MODEL, "activation": "swiglu", "d_ff": 704}, "dtype": "float32"},
    "weights": {
        "model": {**MODEL, "d_model": 512, "num_layers": 6, "num_heads": 8},
        "dtype": "float32",
        "batch": 1,
        "optimizer": "adamw",
    },
}


def reckon(case):
    return estimate(
        TransformerConfig(**case["model"]),
        seq_len=case["seq_len"],
        micro_batch_size=case["batch"],
        dtype=getattr(torch, case["dtype"]),
        optimizer=OptimizerConfig(name=case["optimizer"]),
        grad_checkpointing=case["checkpointing"],
    )


@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_near_the_measured_peak(name):
    case = {"batch": 16, "seq_len": 256, "optimizer": "muon", "checkpointing": False, **CASES[name]}
    command = [sys.executable, "-c", MEASURE, json.dumps(case)]
    measured = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert reckon(case).total_bytes == pytest.approx(measured, rel=0.3)
