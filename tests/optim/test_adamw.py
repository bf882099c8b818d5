"""warploom.optim.AdamW takes the place of torch.optim.AdamW."""

import copy
import inspect

import pytest
import torch
from torch import nn

from warploom.checkpoint.optimizer import flatten_optimizer, restore_optimizer
from warploom.ops import REGISTRY, backend
from warploom.optim import AdamW

OPTIONS = {
    "defaults": {},
    "amsgrad": {"amsgrad": True, "betas": (0.8, 0.9)},
    "maximize": {"maximize": True, "weight_decay": 0.3},
    "no decay": {"weight_decay": 0.0, "eps": 1e-3},
    "little momentum": {"betas": (0.3, 0.5), "lr": 0.1},
    "lr a tensor": {"lr": torch.tensor(3e-3)},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "neither": {"foreach": False, "fused": False},
}
SHAPES = [(33, 40), (1025,), (0,), (), (3, 4, 5)]


def draw(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def parameters(dtype=torch.float32):
    return [nn.Parameter(p) for p in draw(dtype)]


def train(optimizer, params, steps, dtype=torch.float32):
    """Step on gradients that dtype holds. Each parameter sits out some of the steps."""
    for step in steps:
        for i, (p, grad) in enumerate(zip(params, draw(dtype, seed=100 + step), strict=True)):
            p.grad = None if (i + step) % 4 == 3 else grad.to(p.dtype)
        optimizer.step()


def assert_same_bits(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def assert_same_state(a, b):
    assert a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys()
    for key, state in a["state"].items():
        assert state.keys() == b["state"][key].keys()
        assert_same_bits(state.values(), b["state"][key].values())


def assert_no_worse_than_torch(ours, theirs, truth):
    """In the same dtype: at most twice torch's largest error over all parameters, plus two roundings."""
    rounding = torch.finfo(ours[0].dtype).eps * max(p.abs().max() for p in truth if p.numel())

    def error(params):
        return max((p.double() - t).abs().max() for p, t in zip(params, truth, strict=True) if t.numel())

    assert error(ours) <= 2 * error(theirs) + rounding


def test_the_arguments_are_torchs():
    ours, theirs = (inspect.signature(kind.__init__).parameters for kind in (AdamW, torch.optim.AdamW))
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]
    assert [p.kind for p in ours.values()] == [p.kind for p in theirs.values()]


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_steps_are_those_of_torch(options, name):
    op = REGISTRY["adamw"]
    if reason := op.refusal(name, "cpu"):
        pytest.skip(reason)
    ours, theirs, truth = parameters(), parameters(), parameters(torch.float64)
    before = op.calls[f"step/{name}"]
    with backend(adamw=name):
        optimizer = AdamW(ours, **options)
        train(optimizer, ours, range(8))
    assert op.calls[f"step/{name}"] == before + 8
    peer = torch.optim.AdamW(theirs, **options)
    train(peer, theirs, range(8))
    slow = {"foreach": False, "fused": False}
    train(torch.optim.AdamW(truth, **{**options, **slow}), truth, range(8))
    assert_no_worse_than_torch(ours, theirs, truth)
    assert optimizer.state_dict()["param_groups"] == peer.state_dict()["param_groups"]
    for state, expected in zip(optimizer.state.values(), peer.state.values(), strict=True):
        assert state.keys() == expected.keys()
        for key, value in state.items():
            assert value.dtype == expected[key].dtype and value.shape == expected[key].shape
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    options = {"lr": 3e-2, "eps": 1e-4}
    ours, theirs = parameters(dtype), parameters(dtype)
    truth = [nn.Parameter(p.detach().double().clone()) for p in theirs]
    for optimizer, params in ((AdamW, ours), (torch.optim.AdamW, theirs), (torch.optim.AdamW, truth)):
        train(optimizer(params, **options), params, range(4), dtype)
    assert_no_worse_than_torch(ours, theirs, truth)


def test_dtypes_may_be_mixed():
    mixed = [nn.Parameter(p.to(d)) for p, d in zip(draw(), (torch.float32, torch.bfloat16) * 3, strict=False)]
    alone = copy.deepcopy(mixed)
    train(AdamW(mixed), mixed, range(3))
    for dtype in (torch.float32, torch.bfloat16):
        some = [p for p in alone if p.dtype == dtype]
        optimizer = AdamW(some)
        for step in range(3):
            for i, (p, grad) in enumerate(zip(alone, draw(seed=100 + step), strict=True)):
                p.grad = None if (i + step) % 4 == 3 else grad.to(p.dtype)
            optimizer.step()
    assert_same_bits(mixed, alone)


@pytest.mark.parametrize("layout", [lambda p: p.t(), lambda p: p[:, ::2]], ids=["transposed", "strided"])
def test_layouts(layout):
    (weight, *_), (grad, *_) = draw(), draw(seed=1)
    strided, dense = nn.Parameter(layout(weight.clone())), nn.Parameter(layout(weight).contiguous())
    optimizers = AdamW([strided]), AdamW([dense])
    for _ in range(3):
        strided.grad, dense.grad = layout(grad), layout(grad).contiguous()
        for optimizer in optimizers:
            optimizer.step()
    assert not strided.is_contiguous() and dense.is_contiguous()
    assert_same_bits([strided], [dense])


@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_state_dict_goes_to_torch_and_back(amsgrad):
    """Ours goes on bit for bit, and either goes on from the other's state as from its own."""
    start = parameters()
    ours = AdamW(start, amsgrad=amsgrad)
    train(ours, start, range(4))
    saved, weights = copy.deepcopy(ours.state_dict()), [p.detach().clone() for p in start]
    results = {}
    for kind in (AdamW, torch.optim.AdamW):
        params = [nn.Parameter(w.clone()) for w in weights]
        results[kind] = kind(params, lr=1.0), params  # the learning rate comes with the state
        results[kind][0].load_state_dict(copy.deepcopy(saved))  # which keeps the tensors that it is given
        assert_same_state(results[kind][0].state_dict(), saved)
        train(results[kind][0], params, range(4, 8))
    train(ours, start, range(4, 8))
    (again, params), (peer, theirs) = results.values()
    assert_same_bits(params, start)
    assert_same_state(again.state_dict(), ours.state_dict())
    for a, b in zip(start, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    # And back: what torch has made of it.
    back = [nn.Parameter(p.detach().clone()) for p in theirs]
    optimizer = AdamW(back)
    optimizer.load_state_dict(copy.deepcopy(peer.state_dict()))
    train(optimizer, back, range(8, 10))
    train(peer, theirs, range(8, 10))
    for a, b in zip(back, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_torchs_fused_adamw_goes_on_here():
    theirs = {f"p{i}": p for i, p in enumerate(parameters())}
    peer = torch.optim.AdamW(theirs.values(), lr=3e-3, fused=True)
    train(peer, list(theirs.values()), range(4))
    tensors, values = flatten_optimizer(peer, theirs.items(), prefix="adamw/")
    ours = {name: nn.Parameter(p.detach().clone()) for name, p in theirs.items()}
    optimizer = AdamW(ours.values())
    restore_optimizer(optimizer, tensors, values, ours.items(), prefix="adamw/")
    train(optimizer, list(ours.values()), range(4, 8))
    train(peer, list(theirs.values()), range(4, 8))
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], rtol=1e-5, atol=1e-6)


def test_a_copy_goes_on_by_itself():
    params = parameters()
    optimizer = AdamW(params, lr=1e-2)
    train(optimizer, params, range(2))
    other = copy.deepcopy(optimizer)
    others = other.param_groups[0]["params"]
    train(optimizer, params, range(2, 4))
    assert not torch.equal(params[0], others[0])
    train(other, others, range(2, 4))
    assert_same_bits(params, others)


def test_a_state_that_someone_put_there_is_the_one_that_counts():
    params, expected = parameters(), parameters()
    optimizer, peer = AdamW(params), AdamW(expected)
    for p, params_of in ((optimizer, params), (peer, expected)):
        train(p, params_of, range(2))
    new = torch.randn_like(params[0])
    optimizer.state[params[0]]["exp_avg"] = new.clone()
    peer.state[expected[0]]["exp_avg"].copy_(new)
    for p, params_of in ((optimizer, params), (peer, expected)):
        train(p, params_of, range(2, 4))
    assert_same_bits(params, expected)


def test_groups_schedules_and_parameters_that_come_later():
    def make(kind):
        params = parameters()
        optimizer = kind([{"params": params[:2], "weight_decay": 0.5}, {"params": params[2:4], "lr": 0.05}], lr=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.02, 0.1], total_steps=10)
        return params, optimizer, schedule

    made = [make(AdamW), make(torch.optim.AdamW)]
    for params, optimizer, schedule in made:
        for step in range(6):
            if step == 3:
                params[4].grad = None
                optimizer.add_param_group({"params": [params[4]], "lr": 0.03})
                schedule.base_lrs.append(0.03)
            train(optimizer, params, [step])
            if step < 3:
                schedule.step()
    (ours, *_), (theirs, *_) = made
    for a, b, start in zip(ours, theirs, draw(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert not a.numel() or not torch.equal(a, start)


def test_the_closure_is_called_with_gradients_on():
    (weight,) = params = [nn.Parameter(torch.ones(3))]
    optimizer = AdamW(params, lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[0] == 3.0 and losses[2] < losses[1] < losses[0]


def test_factor_and_clearing():
    folded, apart = parameters(), parameters()
    optimizers = AdamW(folded), AdamW(apart)
    for step in range(3):
        for p, q, grad in zip(folded, apart, draw(seed=step), strict=True):
            p.grad, q.grad = grad.clone(), grad * 0.37
        optimizers[0].step(grad_factor=0.37)
        assert_same_bits([p.grad for p in folded], draw(seed=step))
        optimizers[1].step(clear_grads=True)
        assert all(not p.grad.any() for p in apart)
    assert_same_bits(folded, apart)


def test_sparse_gradients_are_refused():
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        AdamW(table.parameters()).step()


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": -1.0},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
        {"eps": -1.0},
        {"weight_decay": -1.0},
        {"lr": torch.tensor([1.0, 2.0])},
        {"lr": torch.tensor(1.0), "foreach": True},
        {"fused": True, "foreach": True},
        {"fused": True, "differentiable": True},
    ],
    ids=str,
)
def test_wrong_arguments_raise_what_torch_raises(wrong):
    errors = []
    for kind in (AdamW, torch.optim.AdamW):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            kind(parameters(), **wrong)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


def test_differentiable_takes_torchs_own_step():
    def meta_gradient(kind):
        """How a loss after the step depends on the gradient that the step was given."""
        grad = torch.tensor([0.3, -0.2, 0.1], requires_grad=True)
        optimizer = kind([nn.Parameter(torch.zeros(3))], eps=0.1, differentiable=True)
        weight = torch.arange(1.0, 4.0, requires_grad=True).clone()
        optimizer.param_groups[0]["params"] = [weight]
        weight.retain_grad()
        weight.grad = grad * 2
        optimizer.step()
        return torch.autograd.grad((weight**2).sum(), grad)[0], weight.detach()

    ours, theirs = meta_gradient(AdamW), meta_gradient(torch.optim.AdamW)
    assert ours[0].all()
    assert_same_bits(ours, theirs)


def test_complex_parameters_take_torchs_own_step():
    params = [nn.Parameter(torch.randn(3, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)))]
    others = copy.deepcopy(params)
    for kind, (p,) in ((AdamW, params), (torch.optim.AdamW, others)):
        p.grad = torch.full_like(p, 1 + 2j)
        kind([p]).step()
    assert_same_bits(params, others)
    with pytest.raises(ValueError, match="grad_factor and clear_grads need real parameters"):
        AdamW(params).step(grad_factor=0.5)


def test_capturable_needs_a_device_that_captures():
    errors = []
    for kind in (AdamW, torch.optim.AdamW):
        params = parameters()
        with pytest.raises((RuntimeError, AssertionError)) as caught:
            train(kind(params, capturable=True), params, [0])
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("fused", [None, True])
def test_gradient_scaling_skips_what_is_not_finite(fused):
    weight = nn.Parameter(torch.ones(4))
    optimizer = AdamW([weight], lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor, moves in ((1.0, True), (float("inf"), False), (1.0, True)):
        before = weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale((weight * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(weight, before) != moves
    assert optimizer.state[weight]["step"] == 2
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], torch.full((4,), 0.19))
