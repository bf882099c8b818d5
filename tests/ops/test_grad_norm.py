"""What is special to grad_norm beside the contract tests: the digits of long sums, and what is not a number."""

import math

import pytest
import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from warploom.ops import backend, grad_norm
from warploom.ops.grad_norm import OP

BACKENDS = [name for name in OP.backends if OP.refusal(name, "cpu") is None]


def draw(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("name", BACKENDS)
def test_long_sums_keep_all_digits(name):
    # A float32 sum would stop to grow at 2**24 times one square.
    grads = [torch.full((300, 1001), 3.0), torch.full((40000,), 1e-3), *draw((123457,))]
    exact = math.sqrt(math.fsum(x * x for grad in grads for x in grad.flatten().tolist()))
    with backend(grad_norm=name):
        norm = grad_norm(grads)
    assert norm.dtype == torch.float32 and norm.shape == ()
    assert abs(norm.item() - exact) <= 1.001 * 2**-24 * exact
    assert get_total_norm(grads).item() == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 69999])
def test_what_is_not_finite_is_seen(name, bad, place):
    grads = draw((3,), (70000,))
    with backend(grad_norm=name):
        assert grad_norm(grads).isfinite()
        grads[1][place] = bad
        norm = grad_norm(grads)
    assert norm.isnan() if math.isnan(bad) else norm == math.inf


@pytest.mark.parametrize("name", BACKENDS)
def test_squares_beyond_float32(name):
    with backend(grad_norm=name):
        assert grad_norm([torch.full((4,), 1e30)]).item() == pytest.approx(2e30)
        assert grad_norm([torch.full((4,), 1e-30)]).item() == pytest.approx(2e-30)
        assert grad_norm([torch.full((4,), 3e38)]).item() == math.inf  # beyond it is the norm itself


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_equal_over_repeats_and_threads(dtype):
    grads = draw((0,), (1,), (7,), (1023,), (400, 700), (65537,), dtype=dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = grad_norm(grads)
        torch.set_num_threads(2)
        assert all(torch.equal(grad_norm(grads), expected) for _ in range(20))
    finally:
        torch.set_num_threads(threads)


def test_of_nothing_it_is_zero():
    assert torch.equal(grad_norm([]), torch.zeros(()))


def test_it_clips_as_torch_does():
    ours, theirs = (torch.nn.Linear(30, 40) for _ in range(2))
    for a, b, grad in zip(ours.parameters(), theirs.parameters(), draw((40, 30), (40,)), strict=True):
        a.grad, b.grad = grad.clone(), grad.clone()
    clip_grads_with_norm_(ours.parameters(), 0.5, grad_norm([p.grad for p in ours.parameters()]))
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("bad", OP.bad_cases, ids=lambda bad: bad.name)
def test_each_back_end_refuses(name, bad):
    with backend(grad_norm=name), pytest.raises(bad.error, match=bad.match):
        grad_norm(**bad.make())


@pytest.mark.parametrize("name", BACKENDS)
def test_opcheck(name):
    with backend(grad_norm=name):
        torch.library.opcheck(torch.ops.warploom.grad_norm_fwd.default, (draw((4, 3), (5,)),))
