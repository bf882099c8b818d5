"""Linear, Embedding, norms and feed-forward layers against plain torch."""

import pytest
import torch
import torch.nn.functional as F

from warploom.nn import GEGLU, Embedding, FeedForward, LayerNorm, Linear, RMSNorm, SwiGLU

ACTIVATIONS = {
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feed_forward_equals_torch(activation, bias):
    module, x = FeedForward(6, 10, activation, bias).double(), torch.randn(2, 3, 6, dtype=torch.float64)
    hidden = ACTIVATIONS[activation](F.linear(x, module.up_proj.weight, module.up_proj.bias))
    torch.testing.assert_close(module(x), F.linear(hidden, module.down_proj.weight, module.down_proj.bias))


@pytest.mark.parametrize("gated, function", [(SwiGLU, F.silu), (GEGLU, lambda x: F.gelu(x, approximate="tanh"))])
def test_gated_layers_equal_torch(gated, function):
    module, x = gated(6, 10, bias=False).double(), torch.randn(2, 3, 6, dtype=torch.float64)
    hidden = function(x @ module.gate_proj.weight.T) * (x @ module.up_proj.weight.T)
    torch.testing.assert_close(module(x), hidden @ module.down_proj.weight.T)


def test_norms_equal_torch_and_return_the_stream():
    x, residual = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 3, 6, dtype=torch.float64)
    layer, rms = LayerNorm(6, 1e-3).double(), RMSNorm(6, 1e-3).double()
    for parameter in (*layer.parameters(), *rms.parameters()):
        torch.nn.init.normal_(parameter)
    for added in (None, residual):
        stream = x if added is None else x + added
        y, returned = layer(x, added)
        torch.testing.assert_close(y, F.layer_norm(stream, (6,), layer.weight, layer.bias, 1e-3))
        torch.testing.assert_close(returned, stream)
        y, returned = rms(x, added)
        torch.testing.assert_close(y, F.rms_norm(stream, (6,), rms.weight, 1e-3))
        torch.testing.assert_close(returned, stream)


def test_norms_are_called_as_torchs():
    """One argument in, one tensor out; the same defaults and state_dict keys."""
    x = torch.randn(2, 3, 6)
    for module, peer in ((LayerNorm, torch.nn.LayerNorm), (RMSNorm, torch.nn.RMSNorm)):
        for shape in (6, (6,)):
            ours, theirs = module(shape), peer(shape)
            theirs.load_state_dict(ours.state_dict())
            torch.testing.assert_close(ours(x), theirs(x))
        with pytest.raises(ValueError, match="normalized_shape must be one dimension"):
            module((3, 6))


@pytest.mark.parametrize(
    "module",
    [Linear(6, 6), LayerNorm(6), LayerNorm(6, bias=False), RMSNorm(6), FeedForward(6, 8), FeedForward(6, 8, "gelu")],
    ids=lambda module: type(module).__name__,
)
def test_float32_weights_serve_bfloat16_activations(module):
    x = torch.randn(4, 6)
    low = module(x.bfloat16())
    full = module(x)
    if isinstance(low, tuple):
        low, full = low[0], full[0]
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), full, atol=0.05, rtol=0.05)
    low.sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in module.parameters())


def test_embedding_scales():
    embedding, tokens = Embedding(5, 4, scale=3.0), torch.tensor([[1, 4]])
    assert torch.equal(embedding(tokens), embedding.weight[tokens] * 3.0)
