"""Silent corruption: bits flipped in gradients of a step that is computed twice are found, and nothing else is."""

import functools
import random

import pytest
import torch
from tests.train.toy import Log, ToyData, counting, ragged, toy_config, toy_model

from warploom.checkpoint import list_checkpoints, load_checkpoint, rng
from warploom.optim import OptimizerConfig, build_optimizers
from warploom.train import corruption
from warploom.train.corruption import ComputedTwice, CorruptionFound
from warploom.train.step import ONE_PROCESS, training_step
from warploom.train.trainer import Trainer


class Flip:
    """Flips a bit of one number of a parameter's gradient, the call-th time it is computed."""

    def __init__(self, parameter, place, bit, call):
        self.place, self.bit, self.call, self.calls = place, bit, call, 0
        self.handle = parameter.register_hook(self.flip)

    def flip(self, grad):
        self.calls += 1
        if self.calls != self.call:
            return None
        flipped = grad.clone()
        flipped.view(torch.int32).view(-1)[self.place] ^= torch.tensor(1 << self.bit, dtype=torch.int64).to(torch.int32)
        return flipped


def test_every_flipped_bit_is_found_in_either_pass_and_named(tmp_path):
    model = toy_model(toy_config(tmp_path, model={"dropout": 0.0}))
    named = list(model.named_parameters())
    optimizers = build_optimizers(model, OptimizerConfig(name="adamw"))
    before = {name: parameter.detach().clone() for name, parameter in named}
    batch = ragged(4, torch.Generator().manual_seed(0))
    loss_sum = functools.partial(model.loss, reduction="sum")
    draw = random.Random(0)
    for trial in range(64):
        name, parameter = draw.choice(named)
        flip = Flip(parameter, draw.randrange(parameter.numel()), trial % 32, call=draw.choice((1, 2)))
        with pytest.raises(CorruptionFound, match=rf"step 7 .* rank 0 .*: the gradient of {name};"):
            training_step(
                loss_sum,
                [batch],
                [p for _, p in named],
                optimizers,
                grad_clip=1.0,
                processes=ComputedTwice(ONE_PROCESS, named, 7),
            )
        flip.handle.remove()
        assert flip.calls == 2
    assert all(torch.equal(parameter, before[name]) for name, parameter in named)
    assert not any(optimizer.state for optimizer in optimizers)


class Faulty(Trainer):
    """A bit of one gradient is flipped in the second micro batch of step 6, on its first pass."""

    def _set_up(self):
        super()._set_up()
        passes = sum(1 + (bool(self.config.train.sdc_check_every) and step % 3 == 0) for step in range(1, 6))
        weight = self.model.stack.blocks[1].attention.q_proj.weight
        self.flip = Flip(weight, place=5, bit=22, call=2 * passes + 2)


def run(folder, kind=Trainer, **settings):
    config = toy_config(folder, steps=8, save_every=2, keep_best=0, **settings)
    trainer = kind(toy_model(config), ToyData(counting), config, monitor=Log())
    trainer.fit()
    return trainer


def test_a_run_ends_at_the_checked_step_and_keeps_what_was_before(tmp_path):
    with pytest.raises(CorruptionFound, match=r"step 6 .* the gradient of stack.blocks.1.attention.q_proj.weight;"):
        run(tmp_path / "checked", Faulty, sdc_check_every=3)
    good = run(tmp_path / "good", sdc_check_every=3)
    kept = list_checkpoints(tmp_path / "checked")
    assert [path.name for path in kept] == ["step-00000004", "step-00000002"]
    # The same command goes on from there, to the bits of a run in which nothing happened.
    again = run(tmp_path / "checked", sdc_check_every=3)
    assert all(again.model.state_dict()[name].equal(value) for name, value in good.model.state_dict().items())


def test_without_the_check_nobody_is_told(tmp_path):
    unchecked = run(tmp_path / "unchecked", Faulty)
    good = run(tmp_path / "good")
    assert unchecked.flip.calls == 16 and unchecked.progress.step == 8
    assert any(not value.equal(good.model.state_dict()[name]) for name, value in unchecked.model.state_dict().items())


def test_a_check_changes_no_bit_of_a_sound_run(tmp_path):
    runs = [run(tmp_path / str(every), sdc_check_every=every) for every in (0, 1, 3)]
    states = [load_checkpoint(tmp_path / str(every) / "step-00000008") for every in (0, 1, 3)]
    for other in runs[1:]:
        assert all(other.model.state_dict()[name].equal(value) for name, value in runs[0].model.state_dict().items())
    for other in states[1:]:
        assert all(other.rng[name].equal(value) for name, value in states[0].rng.items())


def test_planted_other_dropout_the_second_time_is_a_difference(tmp_path, monkeypatch):
    monkeypatch.setattr(corruption.rng, "restore", lambda *states: [])
    with pytest.raises(CorruptionFound, match="step 3 .*: the loss, the gradient of"):
        run(tmp_path, sdc_check_every=3)
    monkeypatch.undo()
    assert rng.restore is corruption.rng.restore


def test_planted_values_compared_instead_of_bits_miss_a_sign_of_zero():
    zero = torch.zeros(3)
    assert torch.equal(zero, -zero) and not corruption._is_same(zero, -zero)
    nan = torch.full((3,), torch.nan)
    assert not torch.equal(nan, nan) and corruption._is_same(nan, nan.clone())
    assert corruption._is_same(None, None) and not corruption._is_same(None, zero)
