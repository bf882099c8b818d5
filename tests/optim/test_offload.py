"""Optimizer state on the host: the same updates, and state that is nowhere else between them."""

import copy

import pytest
import torch

from warploom.checkpoint.optimizer import flatten_optimizer, restore_optimizer
from warploom.models.config import TransformerConfig
from warploom.models.transformer import Transformer
from warploom.optim import OptimizerConfig, build_optimizers, offload
from warploom.train.estimate import estimate

CONFIG = TransformerConfig(vocab_size=32, max_seq_len=16, d_model=16, num_layers=2, num_heads=2)


def models(count):
    torch.manual_seed(0)
    first = Transformer(CONFIG)
    return [first, *(copy.deepcopy(first) for _ in range(count - 1))]


def step(model, optimizers, seed):
    tokens = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    model.loss(tokens, tokens).backward()
    for optimizer in optimizers:
        optimizer.step(grad_factor=0.5)


@pytest.fixture
def visits(monkeypatch):
    """State that visits the device is another tensor than that at home, as it is with a GPU."""
    seen = []

    def visit(value, device):
        if not isinstance(value, torch.Tensor) or not value.dim():
            return value
        seen.append(value)
        return value.clone()

    monkeypatch.setattr(offload, "visit", visit)
    return seen


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_updates_are_the_same_and_state_stays_at_home(name, visits):
    resident, hosted = models(2)
    plain = build_optimizers(resident, OptimizerConfig(name=name))
    away = build_optimizers(hosted, OptimizerConfig(name=name, offload=True))
    for seed in range(4):
        step(resident, plain, seed)
        step(hosted, away, seed)
        if seed == 1:
            homes = [value.data_ptr() for one in away for state in one.state.values() for value in state.values()]
    for a, b in zip(resident.parameters(), hosted.parameters(), strict=True):
        # Muon takes matrices of one shape as a batch, whose products sum in another order.
        torch.testing.assert_close(a, b, rtol=0 if name == "adamw" else 1e-4, atol=0 if name == "adamw" else 1e-6)
    assert homes == [value.data_ptr() for one in away for state in one.state.values() for value in state.values()]
    moments = sum(value.dim() > 0 for one in away for state in one.state.values() for value in state.values())
    assert len(visits) == 3 * moments  # in each step but the first, which makes them


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_checkpoints_go_from_one_to_the_other(name, visits):
    resident, hosted = models(2)
    plain = build_optimizers(resident, OptimizerConfig(name=name))
    for seed in range(2):
        step(resident, plain, seed)
    hosted.load_state_dict(resident.state_dict())
    away = build_optimizers(hosted, OptimizerConfig(name=name, offload=True))
    for a, b in zip(plain, away, strict=True):
        assert type(a).__name__ == type(b).__name__
        tensors, scalars = flatten_optimizer(a, resident.named_parameters())
        restore_optimizer(b, tensors, scalars, hosted.named_parameters())
        assert all(v.device.type == "cpu" for state in b.state.values() for v in state.values())
    step(resident, plain, 2)
    step(hosted, away, 2)
    for a, b in zip(resident.parameters(), hosted.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0 if name == "adamw" else 1e-4, atol=0 if name == "adamw" else 1e-6)


def test_an_error_in_a_step_leaves_the_groups_whole(monkeypatch):
    (model,) = models(1)
    optimizers = build_optimizers(model, OptimizerConfig(name="adamw", offload=True))
    before = [list(group["params"]) for one in optimizers for group in one.param_groups]
    monkeypatch.setattr(offload, "go_home", lambda value, home: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(model, optimizers, 0)
    after = [group["params"] for one in optimizers for group in one.param_groups]
    assert [[id(p) for p in group] for group in after] == [[id(p) for p in group] for group in before]


def test_the_estimate_leaves_the_state_out():
    arguments = {"seq_len": 16, "micro_batch_size": 2, "dtype": torch.float32, "device": "cuda"}
    on_device = estimate(CONFIG, optimizer=OptimizerConfig(name="adamw"), **arguments)
    on_host = estimate(CONFIG, optimizer=OptimizerConfig(name="adamw", offload=True), **arguments)
    assert on_host.optimizer_bytes == 0
    saved = on_device.peak_bytes - on_host.peak_bytes
    assert 0.5 * on_device.optimizer_bytes < saved <= on_device.optimizer_bytes
