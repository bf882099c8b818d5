"""Random and optimizer states come back exactly: what follows a restore equals what followed the capture."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from warploom.checkpoint import environment, rng
from warploom.checkpoint.format import CheckpointState
from warploom.checkpoint.load import load_checkpoint
from warploom.checkpoint.optimizer import flatten_optimizer, restore_optimizer
from warploom.checkpoint.save import save_checkpoint
from warploom.errors import UserError
from warploom.optim.muon import Muon

GENERATORS = {
    "python": lambda: [random.random(), random.gauss(0, 1), random.gauss(0, 1)],
    "numpy": lambda: [*np.random.standard_normal(3), np.random.randint(1000)],
    "torch.cpu": lambda: [*torch.randn(5).tolist(), *torch.rand(3).tolist()],
}


def draw_all():
    return {name: draw() for name, draw in GENERATORS.items()}


def through_a_file(tmp_path, tensors, scalars):
    state = CheckpointState(step=1, weights={}, rng=tensors, meta={"rng": scalars})
    loaded = load_checkpoint(save_checkpoint(tmp_path, state))
    return loaded.rng, loaded.meta["rng"]


@pytest.mark.parametrize("seed", range(5))
def test_random_states(tmp_path, seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    for _ in range(seed):  # odd numbers of normal draws leave one cached in Python's and numpy's generators
        random.gauss(0, 1)
        np.random.standard_normal()
        torch.randn(3)
    tensors, scalars = through_a_file(tmp_path, *rng.capture())
    expected = draw_all()
    assert draw_all() != expected
    assert rng.restore(tensors, scalars) == []
    assert draw_all() == expected


@pytest.mark.parametrize("skipped", GENERATORS)
def test_a_state_that_is_not_restored_shows(skipped):
    tensors, scalars = rng.capture()
    expected = draw_all()
    other_tensors, other_scalars = rng.capture()
    tensors[skipped] = other_tensors[skipped]
    scalars |= {skipped: other_scalars[skipped]} if skipped in scalars else {}
    rng.restore(tensors, scalars)
    drawn = draw_all()
    assert {name for name in GENERATORS if drawn[name] != expected[name]} == {skipped}


def test_states_of_other_devices_are_warned_of():
    tensors, scalars = rng.capture()
    num_devices = torch.cuda.device_count()
    tensors |= {
        f"torch.cuda.{index}": torch.cuda.get_rng_state(index) if index < num_devices else torch.zeros(16).byte()
        for index in range(num_devices + 1)
    }
    (warning,) = rng.restore(tensors, scalars)
    assert f"random states of {num_devices + 1} CUDA devices and {num_devices} are in use" in warning


@pytest.mark.parametrize(
    "spoil", [lambda t, s: t.pop("python"), lambda t, s: s.pop("numpy"), lambda t, s: t.update(python=t["numpy"])]
)
def test_foreign_random_states_are_refused(spoil):
    tensors, scalars = rng.capture()
    spoil(tensors, scalars)
    with pytest.raises(UserError, match="random states cannot be restored"):
        rng.restore(tensors, scalars)


def test_environment():
    saved = environment.capture()
    assert environment.warning(saved) is None
    warning = environment.warning({**saved, "threads": saved["threads"] + 1, "instruction_set": "none"})
    assert f"threads {saved['threads'] + 1} then, {saved['threads']} now, instruction_set 'none' then" in warning
    assert "torch" not in warning


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.first = nn.Linear(6, width, bias=False)
        self.second = nn.Linear(width, 6)
        self.unused = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def matrices(model):
    return [model.first.weight, model.second.weight]


OPTIMIZERS = {
    "adamw": lambda model: [
        torch.optim.AdamW(
            [
                {"params": matrices(model), "weight_decay": 0.1},
                {"params": [model.second.bias, model.unused], "weight_decay": 0.0, "lr": 3e-3},
            ],
            lr=1e-2,
            betas=(0.9, 0.95),
        )
    ],
    "fused adamw": lambda model: [torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)],
    "amsgrad, lr a tensor": lambda model: [torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2), amsgrad=True)],
    "sgd with momentum": lambda model: [torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)],
    "sgd without state": lambda model: [torch.optim.SGD(model.parameters(), lr=1e-2)],
    "asgd": lambda model: [torch.optim.ASGD(model.parameters(), lr=1e-2)],
    "torch muon and adamw": lambda model: [
        torch.optim.Muon(matrices(model), lr=1e-2),
        torch.optim.AdamW([model.second.bias, model.unused], lr=1e-2),
    ],
    "warploom muon and adamw": lambda model: [
        Muon(matrices(model), lr=1e-2),
        torch.optim.AdamW([model.second.bias, model.unused], lr=1e-2),
    ],
}


def train(model, optimizers, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(5, 6, generator=generator)
        loss = (model(x) - x.flip(1)).square().mean()
        loss.backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                lr = 1e-2 / (step + 1)
                group["lr"].fill_(lr) if isinstance(group["lr"], torch.Tensor) else group.update(lr=lr)
            optimizer.step()
            optimizer.zero_grad()


def save_run(tmp_path, model, optimizers):
    tensors, meta = {}, {}
    for index, optimizer in enumerate(optimizers):
        flat, meta[str(index)] = flatten_optimizer(optimizer, model.named_parameters(), prefix=f"{index}/")
        tensors |= flat
    return load_checkpoint(
        save_checkpoint(tmp_path, CheckpointState(step=1, weights=model.state_dict(), optimizer=tensors, meta=meta))
    )


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_bit_for_bit(tmp_path, kind):
    torch.manual_seed(0)
    model = Net()
    optimizers = OPTIMIZERS[kind](model)
    train(model, optimizers, range(4))
    state = save_run(tmp_path, model, optimizers)

    resumed = Net()
    resumed.load_state_dict(state.weights)
    resumed_optimizers = OPTIMIZERS[kind](resumed)
    for index, optimizer in enumerate(resumed_optimizers):
        restore_optimizer(optimizer, state.optimizer, state.meta[str(index)], resumed.named_parameters(), f"{index}/")
    fresh = Net()
    fresh.load_state_dict(state.weights)
    train(fresh, OPTIMIZERS[kind](fresh), range(4, 8))

    for original, restored in zip(optimizers, resumed_optimizers, strict=True):
        a, b = original.state_dict(), restored.state_dict()
        assert a["param_groups"] == b["param_groups"]
        assert str({key: value for key, value in a["state"].items() if value}) == str(
            {key: value for key, value in b["state"].items() if value}
        )
    train(model, optimizers, range(4, 8))
    train(resumed, resumed_optimizers, range(4, 8))
    for name, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    # The control: without the restore, an optimizer that has state goes another way.
    has_state = kind != "sgd without state"
    assert torch.equal(fresh.first.weight, model.first.weight) != has_state


def test_reordered_parameters_find_their_own_state(tmp_path):
    torch.manual_seed(0)
    model = Net()
    optimizers = [torch.optim.AdamW([*matrices(model), model.second.bias], lr=1e-2)]
    train(model, optimizers, range(3))
    state = save_run(tmp_path, model, optimizers)
    reordered = torch.optim.AdamW([model.second.bias, *reversed(matrices(model))], lr=1e-2)
    restore_optimizer(reordered, state.optimizer, state.meta["0"], model.named_parameters(), "0/")
    for parameter in model.parameters():
        for key, value in optimizers[0].state.get(parameter, {}).items():
            assert torch.equal(reordered.state[parameter][key], value)
            assert reordered.state[parameter][key].data_ptr() != value.data_ptr()


def test_state_keeps_its_dtype_when_the_parameter_has_another(tmp_path):
    model = nn.Linear(3, 3).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.state[model.weight]["momentum_buffer"] = torch.randn(3, 3)
    state = save_run(tmp_path, model, [optimizer])
    other = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    restore_optimizer(other, state.optimizer, state.meta["0"], model.named_parameters(), "0/")
    assert torch.equal(other.state[model.weight]["momentum_buffer"], optimizer.state[model.weight]["momentum_buffer"])


def test_mismatches_name_the_parameters(tmp_path):
    model = Net()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2)]
    train(model, optimizers, range(2))
    state = save_run(tmp_path, model, optimizers)
    scalars = state.meta["0"]

    def refusal(make, model, prefix="0/", tensors=state.optimizer):
        optimizer = make(model)
        with pytest.raises(UserError) as caught:
            restore_optimizer(optimizer, tensors, scalars, model.named_parameters(), prefix)
        assert not optimizer.state
        return str(caught.value)

    def adamw(model):
        return torch.optim.AdamW(model.parameters(), lr=1e-2)

    wider = Net(width=9)
    wider.extra = nn.Parameter(torch.zeros(2))
    del wider.unused
    message = refusal(adamw, wider)
    assert "extra is missing from the checkpoint" in message
    assert "unused is not in this run" in message
    assert "first.weight is (8, 6) in the checkpoint and (9, 6) in this run" in message
    assert "second.bias" not in message
    assert "holds the state of AdamW and this run uses SGD" in refusal(lambda m: torch.optim.SGD(m.parameters()), Net())
    assert "divided into other groups" in refusal(
        lambda m: torch.optim.AdamW([{"params": [p]} for p in m.parameters()]), Net()
    )
    assert "1/first.weight/step is missing from the checkpoint" in refusal(adamw, Net(), prefix="1/")
    partial = {name: tensor for name, tensor in state.optimizer.items() if "second.bias/exp_avg_sq" not in name}
    assert "0/second.bias/exp_avg_sq is missing" in refusal(adamw, Net(), tensors=partial)
    many = nn.Sequential(*(nn.Linear(2, 2) for _ in range(100)))
    assert "and 196 more" in refusal(adamw, many)


def test_state_that_no_file_can_hold_is_refused():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.weight]["history"] = [1.0]
    with pytest.raises(TypeError, match="must be a tensor or a number, got <class 'list'>"):
        flatten_optimizer(optimizer, model.named_parameters())
