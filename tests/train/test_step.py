"""The training step: its loss is the mean over the tokens of the global batch, and a bad step leaves no trace."""

import copy
import functools
import math

import pytest
import torch
from tests.train.toy import ToyBatch, ragged, reversing, toy_config, toy_model
from torch.nn.utils import get_total_norm

from warploom.optim import Muon, OptimizerConfig, build_optimizers
from warploom.train.step import training_step


def small_model(tmp_path, **settings):
    return toy_model(toy_config(tmp_path, model={"dropout": 0.0, **settings}))


def run_step(model, micro_batches, name="adamw", optimizers=None, grad_clip=1.0):
    optimizers = optimizers or build_optimizers(model, OptimizerConfig(name=name))
    loss_sum = functools.partial(model.loss, reduction="sum")
    return training_step(loss_sum, micro_batches, list(model.parameters()), optimizers, grad_clip=grad_clip)


def split(batch, sizes):
    parts = zip(batch.tokens.split(sizes), batch.targets.split(sizes), strict=True)
    return [ToyBatch(tokens, targets) for tokens, targets in parts]


@pytest.mark.parametrize("sizes", [[1] * 8, [4, 4], [1, 2, 5]])
def test_accumulation_equals_one_big_batch_when_rows_have_unequal_targets(tmp_path, sizes):
    batch = ragged(8, torch.Generator().manual_seed(0))
    whole, parts = (small_model(tmp_path) for _ in range(2))
    one, several = run_step(whole, [batch]), run_step(parts, split(batch, sizes))
    assert one.num_targets == several.num_targets == int((batch.targets != -100).sum())
    assert several.loss == pytest.approx(one.loss, rel=1e-6)
    assert several.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)

    # The usual mistake, the mean of the parts' means, is far from it on this batch: the test can tell them apart.
    means = [parts.loss(part.tokens, part.targets).item() for part in split(batch, sizes)]
    true = parts.loss(batch.tokens, batch.targets).item()
    assert abs(sum(means) / len(means) - true) > 1e-3 * true or sizes == [4, 4]


def test_the_loss_is_the_models_own_mean(tmp_path):
    model, batch = small_model(tmp_path), ragged(8, torch.Generator().manual_seed(0))
    expected = model.loss(batch.tokens, batch.targets).item()
    assert run_step(model, split(batch, [3, 5])).loss == pytest.approx(expected, rel=1e-6)


def test_an_encoder_decoder_gets_its_source(tmp_path):
    model = small_model(tmp_path, architecture="encoder-decoder")
    batch = reversing(4, torch.Generator().manual_seed(0))
    outcome = run_step(model, [batch])
    assert not outcome.skipped and outcome.num_targets == 20
    assert model.encoder.blocks[0].attention.q_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_clipping_bounds_what_the_optimizers_see_and_reports_the_norm_before(tmp_path, name):
    batch = ragged(8, torch.Generator().manual_seed(0))

    def run(grad_clip):
        """The outcome, the gradients' norm afterwards, and the norm of the gradients as the optimizers saw them."""
        model = small_model(tmp_path)
        optimizers = build_optimizers(model, OptimizerConfig(name=name))
        outcome = run_step(model, [batch], optimizers=optimizers, grad_clip=grad_clip)
        # The first moments after the first step are the gradients, times 1 - decay.
        seen = []
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                key = "momentum_buffer" if isinstance(optimizer, Muon) else "exp_avg"
                decay = group["momentum"] if isinstance(optimizer, Muon) else group["betas"][0]
                seen += [optimizer.state[p][key] / (1 - decay) for p in group["params"]]
        return outcome, get_total_norm([p.grad for p in model.parameters()]).item(), get_total_norm(seen).item()

    free, norm_after, norm_seen = run(grad_clip=0.0)
    assert norm_after == pytest.approx(free.grad_norm, rel=1e-5) and norm_seen == pytest.approx(norm_after, rel=1e-5)
    clipped, norm_after, norm_seen = run(grad_clip=0.1 * free.grad_norm)
    assert clipped.grad_norm == pytest.approx(free.grad_norm)
    assert norm_after == pytest.approx(free.grad_norm, rel=1e-5)
    assert norm_seen == pytest.approx(0.1 * free.grad_norm, rel=1e-4)
    _, _, norm_seen = run(grad_clip=2 * free.grad_norm)
    assert norm_seen == pytest.approx(free.grad_norm, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["loss", "gradient"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_that_is_not_finite_changes_no_bit(tmp_path, name, place, bad):
    model, batch = small_model(tmp_path), ragged(8, torch.Generator().manual_seed(0))
    optimizers = build_optimizers(model, OptimizerConfig(name=name))
    good = run_step(model, [batch], optimizers=optimizers)  # so that there are moments to spoil
    assert not good.skipped and math.isfinite(good.loss) and math.isfinite(good.grad_norm)
    weights = copy.deepcopy(model.state_dict())
    moments = copy.deepcopy([optimizer.state_dict() for optimizer in optimizers])

    def loss_sum(tokens, targets):
        loss = model.loss(tokens, targets, reduction="sum")
        return loss * bad if place == "loss" else loss

    weight = model.stack.blocks[0].attention.q_proj.weight
    hook = weight.register_hook(
        lambda grad: grad.index_fill(0, torch.tensor([1]), bad) if place == "gradient" else None
    )
    outcome = training_step(loss_sum, split(batch, [4, 4]), list(model.parameters()), optimizers, grad_clip=1.0)
    hook.remove()
    assert outcome.skipped and math.isfinite(outcome.loss) == (place == "gradient")
    assert not math.isfinite(outcome.grad_norm)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    for optimizer, before in zip(optimizers, moments, strict=True):
        now = optimizer.state_dict()
        assert now["param_groups"] == before["param_groups"]
        for index, state in before["state"].items():
            assert state and all(torch.equal(value, now["state"][index][key]) for key, value in state.items())

    # Control: the same step without the fault does move them.
    assert not run_step(model, split(batch, [4, 4]), optimizers=optimizers).skipped
    assert any(not torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_a_batch_without_targets_is_skipped(tmp_path):
    model, batch = small_model(tmp_path), ragged(8, torch.Generator().manual_seed(0))
    before = copy.deepcopy(model.state_dict())
    assert run_step(model, [ToyBatch(batch.tokens, torch.full_like(batch.targets, -100))]).skipped
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
