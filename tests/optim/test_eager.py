"""Training imports nothing of torch.compile: its machinery takes more memory than a small model."""

import os
import subprocess
import sys

import pytest

TRAIN = """
import sys
from types import SimpleNamespace
import torch
from warploom.models.config import TransformerConfig
from warploom.models.transformer import Transformer
from warploom.nn.linear import keep_packed
from warploom.optim import OptimizerConfig, build_optimizers
from warploom.train.step import training_step

model = Transformer(TransformerConfig(vocab_size=64, d_model=32, num_layers=1, num_heads=2))
model.compute_dtype = torch.bfloat16
optimizers = build_optimizers(model, OptimizerConfig(), packed=keep_packed(model))
tokens = torch.zeros(2, 8, dtype=torch.int64)
batch = SimpleNamespace(tokens=tokens, targets=tokens)
loss_sum = lambda tokens, targets: model.loss(tokens, targets, reduction="sum")
for _ in range(2):
    training_step(loss_sum, [batch], list(model.parameters()), optimizers, grad_clip=1.0)
    for optimizer in optimizers:
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.zero_grad()
if sys.argv[1:] == ["torch"]:  # the control
    torch.optim.AdamW(model.parameters())
print(*sorted({"torch._dynamo", "sympy", "triton"} & set(sys.modules)))
"""


def imported(*arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", TRAIN, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout.split()


def test_training_does_not_import_torch_dynamo():
    assert imported() == []


@pytest.mark.slow
def test_control_torchs_own_optimizer_does():
    assert "torch._dynamo" in imported("torch")
