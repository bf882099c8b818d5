"""What is special to linear_cross_entropy: its memory, and batches with nothing to predict."""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from warploom.ops import REGISTRY, _extension
from warploom.ops._accuracy import Trial
from warploom.ops.linear_cross_entropy import CHUNK_ELEMENTS, CHUNK_ROWS, linear_cross_entropy


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operator returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_holds_the_logits(dtype):
    N, C, V = 3000, 8, 9000
    hidden, weight = torch.randn(N, C, dtype=dtype), torch.randn(V, C, dtype=dtype)
    targets = torch.randint(V, (N,))
    with LargestTensor() as ours:
        linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets).backward()
    with LargestTensor() as whole:
        REGISTRY["linear_cross_entropy"].torch_peer(hidden, weight, targets).backward()
    assert ours.numel <= max(CHUNK_ELEMENTS, CHUNK_ROWS * V)
    assert whole.numel >= N * V  # the probe sees what it should


def test_nothing_to_predict():
    """As torch: the mean of no losses is NaN, the sum is 0, and neither moves a weight."""
    targets = torch.full((3,), -100)
    for reduction in ("mean", "sum"):
        results = []
        for function in (linear_cross_entropy, REGISTRY["linear_cross_entropy"].torch_peer):
            hidden, weight = torch.ones(3, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
            loss = function(hidden, weight, targets, reduction=reduction)
            loss.backward()
            results.append([loss.detach(), hidden.grad, weight.grad])
        torch.testing.assert_close(*results, equal_nan=True)
        assert loss.isnan() == (reduction == "mean")
        assert not results[0][1].any() and not results[0][2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_backward_pass_gives_the_gradients_again(dtype):
    hidden, weight = torch.randn(6, 8, dtype=dtype).requires_grad_(), torch.randn(5, 8, dtype=dtype).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, -100, 3, 0, 4, 2]))
    once = torch.autograd.grad(loss, (hidden, weight), torch.tensor(3.0), retain_graph=True)
    kept = [gradient.clone() for gradient in once]
    again = torch.autograd.grad(loss, (hidden, weight), torch.tensor(3.0))
    for first, second, copy in zip(once, again, kept, strict=True):
        assert first.equal(copy) and second.equal(copy) and first.data_ptr() != second.data_ptr()


def test_ignored_rows_may_hold_anything():
    """Padding is often never written; NaN there must not reach the weights."""
    hidden = torch.randn(4, 8)
    weight = torch.randn(5, 8, requires_grad=True)
    targets = torch.tensor([1, -100, 3, -100])
    (expected,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), weight)
    hidden[1] = float("nan")
    loss = linear_cross_entropy(hidden, weight, targets)
    (dweight,) = torch.autograd.grad(loss, weight)
    assert loss.isfinite()
    assert torch.equal(dweight, expected)


def test_same_bits_for_many_words_of_few_numbers():
    """So narrow, one block of words is two blocks of a product's columns unless the two are cut alike, and then two
    threads add to the sums of one row at once. As many rows as one block has, so that they are the same ones."""
    N, C, V = 256, 40, 6500
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, C, generator=generator).bfloat16() for n in (N, V))
    targets = torch.randint(V, (N,), generator=generator)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        losses = {linear_cross_entropy(hidden, weight, targets).item() for _ in range(30)}
    finally:
        torch.set_num_threads(threads)
    assert len(losses) == 1


@pytest.mark.skipif(_extension.missing is not None, reason=str(_extension.missing))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", REGISTRY["linear_cross_entropy"].cases, ids=lambda case: case.name)
def test_gradients_in_the_forward_pass(case, dtype):
    """The way of float32 and float64, which a forced back end does not go."""
    op = REGISTRY["linear_cross_entropy"]
    trial, before = Trial(op, case, dtype), op.calls.copy()
    results = trial.evaluate(op.function)
    assert set(op.calls - before) == {"fwd/cpu"}
    if dtype == torch.float64:
        for name, truth in trial.truth.items():
            torch.testing.assert_close(results[name], truth, rtol=1e-9, atol=1e-10, equal_nan=True)
    else:
        assert not [str(deviation) for deviation in trial.deviations(results) if not deviation.acceptable]


@pytest.mark.skipif(_extension.missing is not None, reason=str(_extension.missing))
@pytest.mark.parametrize(
    "case",
    [case for case in REGISTRY["linear_cross_entropy"].cases if "weight" in case.wide],
    ids=lambda case: case.name,
)
def test_gradients_in_the_forward_pass_without_a_matrix_unit(case, monkeypatch):
    """The way of processors whose 16-bit products are dear, at the level in use; test_levels.py takes it at theirs."""
    module = importlib.import_module("warploom.ops.linear_cross_entropy")
    monkeypatch.setattr(module, "_products_are_dear", lambda: True)
    op = REGISTRY["linear_cross_entropy"]
    for dtype in case.dtypes:
        trial, before = Trial(op, case, dtype), op.calls.copy()
        results = trial.evaluate(op.function)
        assert set(op.calls - before) == {"fwd/cpu"}
        assert not [str(deviation) for deviation in trial.deviations(results) if not deviation.acceptable]


# torch.compile's own warning about how it looks into autograd functions.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_the_choice_of_the_way_breaks_no_graph():
    hidden, weight = torch.randn(6, 8, dtype=torch.bfloat16).requires_grad_(), torch.randn(5, 8).requires_grad_()
    targets = torch.randint(5, (6,))
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    gradients = torch.autograd.grad(compiled(hidden, weight, targets), (hidden, weight))
    expected = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), (hidden, weight))
    assert all(found.equal(right) for found, right in zip(gradients, expected, strict=True))
