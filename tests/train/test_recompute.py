"""Memory budgets: the run fits, no cheaper choice would, and the weights are the same bits."""

import itertools
from dataclasses import replace

import pytest
import torch
from tests.train.toy import Log, ToyData, counting, reversing, toy_config, toy_model

from warploom.errors import UserError
from warploom.models.recompute import NOTHING, PRODUCTS, recomputable_blocks
from warploom.train.estimate import estimate
from warploom.train.recompute import Level, MeasuredStack, _descent, _fewest, hull, set_kept
from warploom.train.trainer import Trainer

LEVELS = [Level(None, 0.0, 100.0), Level(frozenset({"a", "b"}), 1.0, 60.0), Level(frozenset({"a"}), 4.0, 40.0)]
LEVELS += [Level(NOTHING, 10.0, 20.0)]


class Cost:
    """An estimate by the levels' bytes alone."""

    def __init__(self, kept):
        self.peak_bytes = sum(next(level.block_bytes for level in LEVELS if level.kept == one) for one in kept)


def test_levels_that_a_mixture_beats_are_left_out():
    dominated = Level(frozenset({"b"}), 9.0, 50.0)
    useless = Level(PRODUCTS, 0.5, 100.0)
    assert hull([LEVELS[3], dominated, LEVELS[0], useless, LEVELS[2], LEVELS[1]]) == LEVELS


@pytest.mark.parametrize("room", range(80, 401, 10))
def test_no_choice_within_the_room_is_faster_by_more_than_one_step(room):
    def seconds(kept):
        return sum(next(level.again_s for level in LEVELS if level.kept == one) for one in kept)

    kept = _fewest(_descent([MeasuredStack([None] * 4, 0.0, 0.0, {}, LEVELS)]), Cost, room)
    assert Cost(kept).peak_bytes <= room
    every = itertools.product([level.kept for level in LEVELS], repeat=4)
    best = min(seconds(one) for one in every if Cost(one).peak_bytes <= room)
    assert seconds(kept) - best < max(b.again_s - a.again_s for a, b in itertools.pairwise(LEVELS))


@pytest.mark.parametrize("make_batch", [counting, reversing])
def test_the_least_room_and_the_most(tmp_path, make_batch):
    model = {"architecture": "encoder-decoder"} if make_batch is reversing else {}
    config = toy_config(tmp_path, model={"num_layers": 3, **model}, grad_checkpointing="budget", memory_gb=1.0)
    stream = ToyData(make_batch).train_batches(4)
    net = toy_model(config)

    def choose(room_bytes):
        train = replace(config.train, memory_gb=room_bytes / 1e9)
        inputs = {name: x for name, x in vars(next(stream)).items() if isinstance(x, torch.Tensor)}
        before = torch.get_rng_state()
        found = set_kept(net, replace(config, train=train), lambda **x: net.loss(reduction="sum", **x), lambda: inputs)
        assert torch.equal(torch.get_rng_state(), before)
        assert [block.kept for block in recomputable_blocks(net)] == list(found.kept)
        assert found.peak_bytes <= room_bytes
        return found

    most = choose(1e9)
    assert set(most.kept) == {None} and most.slowdown == 0
    with pytest.raises(UserError, match=r"^train.memory_gb is 0.0001, and with every block recomputed"):
        choose(1e5)
    least_bytes = least(config, make_batch)
    tight = choose(least_bytes)
    assert tight.kept[0] == NOTHING and tight.slowdown > 0
    between = choose((least_bytes + most.peak_bytes) / 2)
    assert set(between.kept) != {None} and between.kept != tight.kept


def least(config, make_batch):
    return estimate(
        config.model,
        seq_len=make_batch(1, torch.Generator()).tokens.shape[1],
        micro_batch_size=4,
        dtype=torch.float32,
        optimizer=config.optimizer,
        grad_checkpointing="blocks",
    ).peak_bytes


def test_a_budget_trains_the_same_bits(tmp_path):
    plain = toy_config(tmp_path / "plain", steps=3)
    memory_gb = least(plain, counting) / 1e9
    squeezed = toy_config(tmp_path / "squeezed", steps=3, grad_checkpointing="budget", memory_gb=memory_gb)
    states = []
    for config in (plain, squeezed):
        model, log = toy_model(config), Log()
        Trainer(model, ToyData(counting), config, monitor=log).fit()
        states.append(model.state_dict())
    assert any(block.kept is not None for block in recomputable_blocks(model))
    assert any(one.startswith("Of 2 blocks") and "GB at the peak" in one for one in log.messages)
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grad_checkpointing": "budget"}, "belong together"),
        ({"memory_gb": 2.0}, "belong together"),
        ({"grad_checkpointing": "budget", "memory_gb": 2.0, "micro_batch_size": 0}, "give a train.micro_batch_size"),
        ({"grad_checkpointing": "ops", "compile": True}, "train.compile would fuse"),
        ({"grad_checkpointing_every": 0}, "give 1 or more"),
        ({"grad_checkpointing": True}, "cannot|train.grad_checkpointing"),
    ],
)
def test_settings_that_do_not_fit_together(tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        type(toy_config(tmp_path)).from_dict(with_train(toy_config(tmp_path).to_dict(), fields))


def with_train(values, fields):
    return {**values, "train": {**values["train"], **fields}}
