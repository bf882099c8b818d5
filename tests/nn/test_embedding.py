import pytest
import torch
import torch.nn.functional as F

from warploom.nn.embedding import Embedding
from warploom.ops import linear_cross_entropy


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_an_output_layer_that_shares_the_weight_gets_one_gradient(scale: float) -> None:
    torch.manual_seed(0)
    embedding = Embedding(23, 16, scale).double()
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
