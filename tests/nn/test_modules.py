"""Linear, Embedding, norms and feed-forward layers against plain torch."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from tests.patch.rule import calls, check_module, draw

from warploom.nn import GEGLU, Embedding, FeedForward, LayerNorm, Linear, MultiheadAttention, RMSNorm, SwiGLU

ACTIVATIONS = {
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class OnItself(torch.nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)


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


NORMS = [(LayerNorm, torch.nn.LayerNorm), (RMSNorm, torch.nn.RMSNorm)]
NORM_OPTIONS = [
    *({}, {"eps": 0.1}, {"elementwise_affine": False}, {"elementwise_affine": False, "eps": 0.1}),
    *({"bias": False}, {"elementwise_affine": False, "bias": True}),  # LayerNorm's alone
]
NORM_PAIRS = [
    pytest.param(ours, theirs, options, id=f"{ours.__name__}-{options}")
    for ours, theirs in NORMS
    for options in NORM_OPTIONS
    if ours is LayerNorm or "bias" not in options
]


@pytest.mark.parametrize("shape", [24, (24,), [4, 6], (2, 4, 3)], ids=str)
@pytest.mark.parametrize("ours, theirs, options", NORM_PAIRS)
def test_norms_are_torchs(ours, theirs, options, shape):
    module, peer = ours(shape, **options), theirs(shape, **options)
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter)
    module.load_state_dict(peer.state_dict())
    assert list(module.state_dict()) == list(peer.state_dict()) and repr(module) == repr(peer)
    x = draw(2, 5, *peer.normalized_shape)
    op = "layer_norm" if ours is LayerNorm else "rms_norm"
    if list(peer.parameters()):
        check_module(module, peer, [x], {op: 1})
    else:  # no parameter tells which of the modules is the exact one
        assert_close_with_gradients(module, peer, x, op)


def assert_close_with_gradients(module, peer, x, op):
    before, results = calls(op), []
    for norm, dtype in ((module, x.dtype), (peer, x.dtype), (peer, torch.float64)):
        leaf = x.to(dtype).requires_grad_()
        y = norm(leaf)
        results.append((y.detach(), *torch.autograd.grad((y.double() ** 3).sum(), leaf)))
    assert calls(op) == before + 1
    for found, plain, true in zip(*results, strict=True):
        of_rounding = 4 * torch.finfo(x.dtype).eps * true.abs().max()
        assert (found - true).abs().max() <= 2 * (plain - true).abs().max() + of_rounding


@pytest.mark.parametrize("ours, theirs", NORMS)
@pytest.mark.parametrize("options", [{}, {"elementwise_affine": False}], ids=str)
def test_norms_over_several_dimensions_return_the_stream(ours, theirs, options):
    module, peer = ours((4, 6), 1e-3, **options).double(), theirs((4, 6), 1e-3, **options).double()
    x, residual = torch.randn(2, 3, 4, 6, dtype=torch.float64), torch.randn(2, 3, 4, 6, dtype=torch.float64)
    y, stream = module(x, residual)
    torch.testing.assert_close(y, peer(x + residual))
    torch.testing.assert_close(stream, x + residual)
    y, stream = module(x, None)
    torch.testing.assert_close(y, peer(x))
    assert stream is x


@pytest.mark.parametrize("ours, theirs", NORMS)
def test_norms_are_constructed_as_torchs(ours, theirs):
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert ours(6, 1e-3, False).weight is None and ours(6, dtype=torch.float64).weight.dtype == torch.float64
    with pytest.raises(ValueError, match=r"x must end in \(3, 4\) \(normalized_shape\), got shape \(2, 4, 3\)"):
        ours((3, 4))(torch.zeros(2, 4, 3))
    for options in ({}, {"elementwise_affine": False}):
        with pytest.raises(ValueError, match="weight must be"):
            ours(6, **options)(torch.zeros(2, 5))


def test_the_default_eps_of_rms_norm_is_that_of_the_sums():
    """16-bit rows so small that the machine epsilon of their own dtype would be most of the denominator."""
    x = (torch.randn(4, 64) * 1e-2).bfloat16()
    torch.testing.assert_close(RMSNorm(64)(x), torch.nn.RMSNorm(64, dtype=torch.bfloat16)(x), rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    "module",
    [
        *(Linear(6, 6), LayerNorm(6), LayerNorm(6, bias=False), RMSNorm(6)),
        *(FeedForward(6, 8), FeedForward(6, 8, "gelu"), OnItself(MultiheadAttention(6, 2))),
    ],
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
