"""The tree over micro batches: its order, what cannot share it, and what the trainer refuses with it."""

import pytest
import torch
from tests.train.toy import ToyData, counting, toy_config, toy_model
from torch import nn

from warploom.checkpoint import load_checkpoint
from warploom.errors import UserError
from warploom.parallel.tree import TreeSum, check, step_seed
from warploom.train.trainer import Trainer


def sums(values):
    """Gradients of micro batches that are given numbers, as TreeSum adds them."""
    parameter = nn.Parameter(torch.zeros(()))
    summing = TreeSum([parameter], lambda: 0, None)
    batches = [{"tokens": torch.tensor(value)} for value in values]
    loss = summing.accumulate(lambda tokens: tokens * (1 + parameter), batches, 1)
    return parameter.grad.item(), loss.item()


def tree(values):
    middle = len(values) // 2
    return tree(values[:middle]) + tree(values[middle:]) if middle else torch.tensor(values[0])


def test_halves_are_added_before_their_sums():
    big = 2.0**24  # 1 is half of its last digit, and is lost in it unless two are added first
    assert sums([big, 1.0, 1.0, 1.0]) == (big + 2, big + 2) and sum((1.0, 1.0, 1.0), torch.tensor(big)) == big
    values = torch.randn(13, generator=torch.Generator().manual_seed(0)).tolist()
    assert sums(values) == (tree(values).item(),) * 2


def test_parameters_without_a_gradient_count_as_zero():
    used, unused = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(2))
    TreeSum([used, unused], lambda: 0, None).accumulate(
        lambda tokens: tokens * used, [{"tokens": torch.ones(())}] * 2, 2
    )
    assert used.grad == 1.0 and torch.equal(unused.grad, torch.zeros(2))


def test_dropout_depends_on_step_and_micro_batch_alone():
    drawn = {}

    def loss_sum(tokens):
        drawn.setdefault(int(tokens), []).append(torch.rand(()).item())
        return parameter * tokens

    parameter = nn.Parameter(torch.ones(()))
    step = [0]
    summing = TreeSum([parameter], lambda: step_seed(5, step[0]), None)
    for step[0] in (0, 1, 0):
        torch.manual_seed(step[0])
        summing.accumulate(loss_sum, [{"tokens": torch.tensor(float(i))} for i in range(4)], 1)
    first, other, again = zip(*drawn.values(), strict=True)
    assert first == again and len({*first, *other}) == 8


@pytest.mark.parametrize(("leaves", "replicas"), [(8, 3), (6, 4), (8, 16), (5, 2)])
def test_replicas_that_cannot_share_the_tree(leaves, replicas):
    with pytest.raises(
        UserError, match=rf"sums {leaves} micro batches .* {replicas} replicas cannot share.*parallel.data 1"
    ):
        check(leaves, replicas)


@pytest.mark.parametrize(("leaves", "replicas"), [(8, 1), (8, 2), (8, 8), (12, 4), (5, 1)])
def test_replicas_that_can(leaves, replicas):
    check(leaves, replicas)


def fit(config):
    return Trainer(toy_model(config), ToyData(counting), config).fit()


def test_what_decides_the_tree_stays_as_it_was(tmp_path):
    with pytest.raises(UserError, match="give a train.micro_batch_size above 0"):
        fit(toy_config(tmp_path, deterministic="elastic", micro_batch_size=0))
    fit(toy_config(tmp_path, deterministic="elastic", steps=2))
    with pytest.raises(UserError, match="train.micro_batch_size: 4 in the checkpoint, 2 now"):
        fit(toy_config(tmp_path, deterministic="elastic", steps=3, micro_batch_size=2))
    with pytest.raises(UserError, match="train.deterministic: 'elastic' in the checkpoint, 'layout' now"):
        fit(toy_config(tmp_path, steps=3))
    assert fit(toy_config(tmp_path, deterministic="elastic", steps=3)).steps == 3


def test_elastic_trains_as_usual_within_rounding(tmp_path):
    arguments = {"model": {"dropout": 0.0}, "steps": 4, "micro_batch_size": 2}
    ends = [fit(toy_config(tmp_path / kind, deterministic=kind, **arguments)) for kind in ("layout", "elastic")]
    usual, elastic = (load_checkpoint(end.checkpoint).weights for end in ends)
    for name, tensor in usual.items():
        torch.testing.assert_close(elastic[name], tensor, rtol=1e-3, atol=1e-5)
