import inspect

import pytest
import torch
import torch.nn.functional as F

from warploom.nn.embedding import Embedding
from warploom.ops import linear_cross_entropy


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_an_output_layer_that_shares_the_weight_gets_one_gradient(scale: float) -> None:
    torch.manual_seed(0)
    embedding = Embedding(23, 16, scale=scale).double()
    tokens, targets = torch.randint(23, (2, 3, 5))
    embedded, weight = embedding.with_weight(tokens)
    torch.testing.assert_close(embedded, embedding(tokens), rtol=0, atol=0)
    linear_cross_entropy(embedded, weight, targets).backward()
    expected = embedding.weight.detach().clone().requires_grad_()
    logits = (F.embedding(tokens, expected) * scale) @ expected.T
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    torch.testing.assert_close(embedding.weight.grad, expected.grad)


def test_gradients_of_one_of_the_two_uses() -> None:
    embedding = Embedding(7, 4)
    tokens = torch.tensor([[1, 1, 3]])
    embedded, weight = embedding.with_weight(tokens)
    (from_rows,) = torch.autograd.grad(embedded.sum(), embedding.weight)
    assert from_rows.sum(1).tolist() == [0, 8, 0, 4, 0, 0, 0]
    embedded, weight = embedding.with_weight(tokens)
    (from_weight,) = torch.autograd.grad(weight.sum(), embedding.weight)
    assert torch.equal(from_weight, torch.ones_like(from_weight))


@pytest.mark.parametrize("padding_idx", [0, 3, -1])
@pytest.mark.parametrize("with_weight", [False, True])
def test_the_row_of_the_padding_gets_no_gradient(padding_idx: int, with_weight: bool) -> None:
    torch.manual_seed(0)
    ours, tokens = Embedding(7, 4, padding_idx), torch.tensor([[1, 0, 3, 3], [6, 6, 0, 2]])
    assert ours.padding_idx == padding_idx % 7
    assert torch.equal(ours.weight[padding_idx], torch.zeros(4)) and (ours.weight != 0).any(1).sum() == 6
    torch.nn.init.normal_(ours.weight)  # torch stops the gradient of this row, and lets it have values
    theirs = torch.nn.Embedding(7, 4, padding_idx)
    theirs.load_state_dict(ours.state_dict())
    embedded = ours.with_weight(tokens)[0] if with_weight else ours(tokens)
    expected = theirs(tokens)
    assert torch.equal(embedded, expected)
    for y in (embedded, expected):
        y.square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-6, atol=0)
    assert torch.equal(ours.weight.grad[padding_idx], torch.zeros(4))
    assert (ours.weight.grad != 0).any(1).sum() == 4 and padding_idx % 7 in tokens


def test_constructed_as_torchs() -> None:
    ours, theirs = (inspect.signature(cls).parameters.values() for cls in (Embedding, torch.nn.Embedding))
    described = [[(p.name, p.default, p.kind) for p in parameters] for parameters in (ours, theirs)]
    assert described[0] == [*described[1], ("scale", 1.0, inspect.Parameter.KEYWORD_ONLY)]
    torch.manual_seed(0)
    embedding = Embedding(5, 4, dtype=torch.float64)
    torch.manual_seed(0)
    assert torch.equal(embedding.weight, torch.nn.Embedding(5, 4, dtype=torch.float64).weight)
    table = torch.randn(5, 4)
    embedding = Embedding.from_pretrained(table, padding_idx=1)
    assert torch.equal(embedding(torch.arange(5)), table) and not embedding.weight.requires_grad


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
def test_what_the_op_has_not_is_refused(options: dict) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be left out, got .*: torch.nn.Embedding does it"):
        Embedding(5, 4, **options)
