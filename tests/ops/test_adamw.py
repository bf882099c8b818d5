"""What is special to adamw beside the contract tests: any sizes and settings, memory around its tensors, autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from warploom.ops import adamw, backend
from warploom.ops._accuracy import Trial
from warploom.ops._op import Case
from warploom.ops.adamw import OP

LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps")
SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8}
BACKENDS = [name for name in OP.backends if OP.refusal(name, "cpu") is None]
SIZES = (0, 1, 7, 1023, 1025)


def draw(shapes, dtype=torch.float32, steps=3, amsgrad=False):
    """The lists of parameters that have made some steps."""
    generator = torch.Generator().manual_seed(0)

    def normal(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    lists = {
        "params": [normal(shape) for shape in shapes],
        "grads": [normal(shape) for shape in shapes],
        "exp_avgs": [0.3 * normal(shape) for shape in shapes],
        "exp_avg_sqs": [0.1 * normal(shape).square() for shape in shapes],
        "max_exp_avg_sqs": [0.1 * normal(shape).square() for shape in shapes] if amsgrad else [],
    }
    lists = {name: [tensor.to(dtype) for tensor in tensors] for name, tensors in lists.items()}
    return {**lists, "state_steps": [torch.tensor(float(steps)) for _ in shapes]}


def clone(lists):
    return {name: [tensor.clone() for tensor in tensors] for name, tensors in lists.items()}


def assert_same_bits(lists, expected, names=LISTS):
    for name in names:
        for i, (a, b) in enumerate(zip(lists[name], expected[name], strict=True)):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) and torch.equal(a.isnan(), b.isnan()), (name, i)


shapes = st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=5)
fractions = st.floats(0, 0.999)


@pytest.mark.parametrize("name", BACKENDS)
@given(
    shapes=shapes,
    steps=st.integers(0, 2000),
    amsgrad=st.booleans(),
    changed=st.fixed_dictionaries(
        {
            "lr": st.floats(0, 1),
            "beta1": fractions,
            "beta2": fractions,
            "weight_decay": st.floats(0, 1),
            "eps": st.floats(1e-10, 1),
            "maximize": st.booleans(),
            "grad_factor": st.floats(0, 1),
            "clear_grads": st.booleans(),
        }
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=40, deadline=None)
def test_any_sizes_and_settings(name, shapes, steps, amsgrad, changed, dtype):
    def make(generator):
        return {**draw(shapes, torch.float64, steps, amsgrad), **changed}

    trial = Trial(OP, Case("drawn", make, wide=("state_steps",)), dtype)
    with backend(adamw=name):
        wrong = [str(deviation) for deviation in trial.deviations(trial.evaluate(adamw)) if not deviation.acceptable]
    assert not wrong, "; ".join(wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_equal_over_repeats_and_threads(dtype):
    # Blocks of several tensors on each thread, and a tensor that several blocks share.
    start = draw([*((size,) for size in SIZES), (130, 700), (50000,), (3, 9, 11)], dtype, amsgrad=True)
    expected = clone(start)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        adamw(**expected, **SETTINGS, clear_grads=True)
        assert not any(torch.equal(a, b) for a, b in zip(start["params"][2:], expected["params"][2:], strict=True))
        torch.set_num_threads(2)
        for _ in range(20):
            lists = clone(start)
            adamw(**lists, **SETTINGS, clear_grads=True)
            assert_same_bits(lists, expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_written_beside_the_tensors(name, dtype):
    lists, around = draw([(size,) for size in SIZES], dtype, amsgrad=True), []
    for tensors in lists.values():
        for i, tensor in enumerate(tensors):
            whole = torch.full((tensor.numel() + 131,), float("nan"), dtype=tensor.dtype)
            tensors[i] = whole[3 : 3 + tensor.numel()].view(tensor.shape).copy_(tensor)
            around.append((whole[:3], whole[3 + tensor.numel() :]))
    with backend(adamw=name):
        adamw(**lists, **SETTINGS, clear_grads=True)
    assert all(tensor.isfinite().all() for tensors in lists.values() for tensor in tensors)
    assert all(before.isnan().all() and after.isnan().all() for before, after in around)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_nan_stays_where_it_is(name):
    clean = draw([(70, 40), (1025,)], amsgrad=True)
    spoiled = clone(clean)
    spoiled["grads"][0][5, 7] = spoiled["grads"][1][1024] = float("nan")
    with backend(adamw=name):
        adamw(**clean, **SETTINGS)
        adamw(**spoiled, **SETTINGS)
    for key in ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"):
        for tensor, index in ((spoiled[key][0], (5, 7)), (spoiled[key][1], (1024,))):
            assert tensor[index].isnan() and tensor.isnan().sum() == 1
        for a, b in zip(spoiled[key], clean[key], strict=True):
            torch.testing.assert_close(a.where(~a.isnan(), b), b, rtol=0, atol=0)


@pytest.mark.parametrize("name", BACKENDS)
def test_bfloat16_gradients_beside_float32_parameters(name):
    lists = draw([(40, 33), (1025,), (0,)])
    lists["grads"] = [grad.bfloat16() for grad in lists["grads"]]
    wide = clone(lists)
    wide["grads"] = [grad.float() for grad in lists["grads"]]
    with backend(adamw=name):
        adamw(**lists, **SETTINGS, clear_grads=True)
        adamw(**wide, **SETTINGS)
    assert_same_bits(lists, wide, ("params", "exp_avgs", "exp_avg_sqs", "state_steps"))
    assert all(grad.dtype == torch.bfloat16 and not grad.any() for grad in lists["grads"])


@pytest.mark.parametrize("name", BACKENDS)
def test_the_factor_is_a_product_that_the_gradients_do_not_see(name):
    folded = draw([(40, 33), (1025,)])
    apart = clone(folded)
    torch._foreach_mul_(apart["grads"], -0.37)
    before = clone(folded)
    with backend(adamw=name):
        adamw(**folded, **SETTINGS, grad_factor=0.37, maximize=True)
        adamw(**apart, **SETTINGS)
    assert_same_bits(folded, apart, ("params", "exp_avgs", "exp_avg_sqs"))
    assert_same_bits(folded, before, ("grads",))


@pytest.mark.parametrize("name", BACKENDS)
def test_every_parameter_counts_its_own_steps(name):
    together = draw([(33,), (0,), (5, 6)])
    together["state_steps"] = [torch.tensor(0.0), torch.tensor(4.0), torch.tensor(1e4, dtype=torch.float64)]
    alone = clone(together)
    with backend(adamw=name):
        adamw(**together, **SETTINGS)
        for i in range(3):
            adamw(**{key: tensors[i : i + 1] for key, tensors in alone.items()}, **SETTINGS)
    assert_same_bits(together, alone)
    assert [step.item() for step in together["state_steps"]] == [1, 5, 10001]


@pytest.mark.parametrize("name", BACKENDS)
def test_no_parameters_are_no_work(name):
    before = OP.calls.copy()
    with backend(adamw=name):
        adamw([], [], [], [], [], [], **SETTINGS)
    assert OP.calls == before


@pytest.mark.parametrize("name", BACKENDS)
def test_autograd_knows_that_the_parameters_have_changed(name):
    lists = draw([(4, 3)])
    weight = lists["params"][0].requires_grad_()
    y = (weight * weight).sum()
    with backend(adamw=name):
        adamw(**lists, **SETTINGS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("bad", OP.bad_cases, ids=lambda bad: bad.name)
def test_each_back_end_refuses_and_leaves_everything_as_it_was(name, bad):
    arguments = bad.make()
    before = {key: [tensor.clone() for tensor in arguments[key]] for key in LISTS}
    with backend(adamw=name), pytest.raises(bad.error, match=bad.match):
        adamw(**arguments)
    assert_same_bits(arguments, before)


@pytest.mark.parametrize("name", BACKENDS)
def test_opcheck(name):
    """The schema says what is changed, and the fake implementation changes nothing."""
    lists = draw([(4, 3), (5,)], amsgrad=True)
    with backend(adamw=name):
        torch.library.opcheck(
            torch.ops.warploom.adamw_step.default, (*lists.values(), [], *SETTINGS.values(), False, 0.5, True)
        )
