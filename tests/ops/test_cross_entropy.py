"""What is special to cross_entropy: gradients that lie where the logits lay, and batches with nothing to predict."""

import pytest
import torch

from warploom.ops import REGISTRY, backend
from warploom.ops.cross_entropy import cross_entropy

OP = REGISTRY["cross_entropy"]
BACKENDS = [name for name in OP.backends if OP.refusal(name, "cpu") is None]


def draw():
    return torch.randn(6, 40, generator=torch.Generator().manual_seed(0)), torch.arange(6)


def gradient(logits, targets, scale=1.0, **options):
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(scale * cross_entropy(logits, targets, **options), logits)[0]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_in_place_the_gradient_lies_in_the_logits_memory(name, scale):
    logits, targets = draw()
    with backend(cross_entropy=name):
        expected = gradient(logits, targets, scale)
        (found,) = torch.autograd.grad(scale * cross_entropy(logits.requires_grad_(), targets, inplace=True), logits)
    assert found.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", BACKENDS)
def test_in_place_leaves_logits_alone_without_gradients(name):
    logits, targets = draw()
    before = logits.clone()
    with backend(cross_entropy=name), torch.no_grad():
        cross_entropy(logits.requires_grad_(), targets, inplace=True)
    assert torch.equal(logits, before)


def test_in_place_is_noticed_by_whoever_saved_the_logits():
    x, targets = draw()
    logits = x.requires_grad_() * 1
    of_values = logits.square().sum()
    loss = cross_entropy(logits, targets, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + of_values).backward()


def test_backward_twice():
    """Out of place always; in place as long as the memory still holds the gradient of the loss itself."""
    logits, targets = draw()
    for inplace, scale in ((False, 1.0), (False, 2.0), (True, 1.0)):
        leaf = logits.clone().requires_grad_()
        loss = scale * cross_entropy(leaf, targets, inplace=inplace)
        first = torch.autograd.grad(loss, leaf, retain_graph=True)[0].clone()
        assert torch.equal(first, torch.autograd.grad(loss, leaf)[0])
    leaf = logits.clone().requires_grad_()
    loss = 2 * cross_entropy(leaf, targets, inplace=True)
    torch.autograd.grad(loss, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf)


@pytest.mark.parametrize("name", BACKENDS)
def test_in_place_operator(name):
    logits, targets = draw()
    with backend(cross_entropy=name):
        torch.library.opcheck(torch.ops.warploom.cross_entropy_fwd_inplace.default, (logits, targets, -100, True))


# Dynamo makes itself an instance of torch.autograd.Function while it traces one.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_in_place_compiles():
    x, targets = draw()

    def step(x):
        return 3 * cross_entropy(x * 1, targets, inplace=True)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(x.requires_grad_()), x)
    torch._dynamo.reset()
    torch.testing.assert_close(found, gradient(x.detach(), targets, 3.0))


@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_to_predict(name):
    """As torch: the mean of no losses is NaN, the sum is 0, and neither moves a logit."""
    targets = torch.full((3,), -100)
    for reduction in ("mean", "sum"):
        logits = torch.ones(3, 5, requires_grad=True)
        with backend(cross_entropy=name):
            loss = cross_entropy(logits, targets, reduction=reduction)
            loss.backward()
        assert loss.isnan() if reduction == "mean" else loss == 0
        assert torch.equal(logits.grad, torch.zeros(3, 5))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_spoils_itself_and_the_loss(name, value):
    logits, targets = draw()
    logits[2, 7] = value
    with backend(cross_entropy=name):
        found = gradient(logits, targets)
        loss = cross_entropy(logits, targets)
    assert loss.isnan()
    assert found.isnan().all(1).tolist() == [row == 2 for row in range(6)]


@pytest.mark.parametrize("name", BACKENDS)
def test_classes_that_are_ruled_out(name):
    """Logits of -inf: probability and gradient are 0."""
    logits, targets = draw()
    logits[:, 20:] = -float("inf")
    with backend(cross_entropy=name):
        found = gradient(logits, targets)
    torch.testing.assert_close(found[:, :20], gradient(logits[:, :20], targets))
    assert not found[:, 20:].any()
