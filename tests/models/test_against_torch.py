"""Whole models against independent implementations in plain torch that share their weights: logits and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from warploom.models import Transformer, TransformerConfig


def build(**fields) -> tuple[Transformer, dict[str, Tensor]]:
    """A tiny model in float64 with random weights, norms and biases included, and its parameters by name."""
    torch.manual_seed(0)
    shape = {"vocab_size": 19, "max_seq_len": 16, "d_model": 24, "num_layers": 3, "num_heads": 4, "d_ff": 40}
    model = Transformer(TransformerConfig(**{**shape, **fields})).double()
    model.compute_dtype = torch.float64
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model, dict(model.named_parameters())


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 19, shape, generator=torch.Generator().manual_seed(seed))


def assert_equal_logits_and_gradients(model: Transformer, x: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(model.logits(model(x)), expected, rtol=1e-9, atol=1e-9)
    targets = tokens(*x.shape, seed=9)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(model.loss(x, targets), parameters)
    theirs = torch.autograd.grad(F.cross_entropy(expected.flatten(0, 1), targets.flatten()), parameters)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def test_gpt2():
    model, p = build(position="learned", activation="gelu_tanh", bias=True)
    x = tokens(2, 11)

    def linear(h, name):
        return F.linear(h, p[f"{name}.weight"], p[f"{name}.bias"])

    def norm(h, name):
        return F.layer_norm(h, (24,), p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)

    h = p["embedding.weight"][x] + p["stack.position.table.weight"][:11]
    for i in range(3):
        block = f"stack.blocks.{i}"
        y = norm(h, f"{block}.attention_norm")
        q, k, v = (split_heads(linear(y, f"{block}.attention.{part}_proj"), 4) for part in "qkv")
        scores = (q @ k.transpose(-1, -2) / 6**0.5).masked_fill(torch.ones(11, 11).triu(1).bool(), -torch.inf)
        o = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        h = h + linear(o, f"{block}.attention.o_proj")
        y = linear(norm(h, f"{block}.feed_forward_norm"), f"{block}.feed_forward.up_proj")
        y = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
        h = h + linear(y, f"{block}.feed_forward.down_proj")
    assert_equal_logits_and_gradients(model, x, norm(h, "stack.norm") @ p["embedding.weight"].T)


def turn(x: Tensor) -> Tensor:
    """Rotary as the multiplication of complex numbers: feature i is the real part, feature i + D / 2 the imaginary."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * frequencies
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], -1)


def test_llama():
    model, p = build(activation="swiglu", norm="rms_norm", num_kv_heads=2, tie_embeddings=False, norm_eps=1e-6)
    x = tokens(2, 11)

    def linear(h, name):
        return h @ p[f"{name}.weight"].T

    def norm(h, name):
        return h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p[f"{name}.weight"]

    h = p["embedding.weight"][x]
    for i in range(3):
        block = f"stack.blocks.{i}"
        y = norm(h, f"{block}.attention_norm")
        q = turn(split_heads(linear(y, f"{block}.attention.q_proj"), 4))
        k = turn(split_heads(linear(y, f"{block}.attention.k_proj"), 2))[:, [0, 0, 1, 1]]
        v = split_heads(linear(y, f"{block}.attention.v_proj"), 2)[:, [0, 0, 1, 1]]
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        h = h + linear(o, f"{block}.attention.o_proj")
        y = norm(h, f"{block}.feed_forward_norm")
        gate = linear(y, f"{block}.feed_forward.gate_proj")
        y = gate / (1 + torch.exp(-gate)) * linear(y, f"{block}.feed_forward.up_proj")
        h = h + linear(y, f"{block}.feed_forward.down_proj")
    assert_equal_logits_and_gradients(model, x, linear(norm(h, "stack.norm"), "lm_head"))


@pytest.mark.parametrize("parallel_norms", [1, 2])
def test_falcon(parallel_norms):
    model, p = build(activation="gelu", num_kv_heads=1, parallel_block=True, parallel_norms=parallel_norms)
    x = tokens(2, 11)

    def linear(h, name):
        return h @ p[f"{name}.weight"].T

    def norm(h, name):
        return F.layer_norm(h, (24,), p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)

    h = p["embedding.weight"][x]
    for i in range(3):
        block = f"stack.blocks.{i}"
        y = norm(h, f"{block}.attention_norm")
        z = y if parallel_norms == 1 else norm(h, f"{block}.feed_forward_norm")
        q = turn(split_heads(linear(y, f"{block}.attention.q_proj"), 4))
        k = turn(linear(y, f"{block}.attention.k_proj")[:, None]).expand_as(q)
        v = linear(y, f"{block}.attention.v_proj")[:, None].expand_as(q)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        feed_forward = linear(F.gelu(linear(z, f"{block}.feed_forward.up_proj")), f"{block}.feed_forward.down_proj")
        h = h + linear(o, f"{block}.attention.o_proj") + feed_forward
    assert_equal_logits_and_gradients(model, x, linear(norm(h, "stack.norm"), "embedding"))


def torch_layer(kind: type, p: dict[str, Tensor], block: str, norm_first: bool) -> nn.Module:
    """A torch.nn.TransformerEncoderLayer or DecoderLayer with the weights of one of our blocks."""
    layer = kind(24, 4, 40, dropout=0.0, norm_first=norm_first, batch_first=True, dtype=torch.float64)
    parts = {"self_attn": "attention", "multihead_attn": "cross_attention"}
    cross = kind is nn.TransformerDecoderLayer
    names = {"linear1": "feed_forward.up_proj", "linear2": "feed_forward.down_proj", "norm1": "attention_norm"}
    names["norm2"] = "cross_attention_norm" if cross else "feed_forward_norm"
    if cross:
        names["norm3"] = "feed_forward_norm"
    state = {}
    for end in ("weight", "bias"):
        for theirs, ours in parts.items():
            if theirs == "self_attn" or cross:
                state[f"{theirs}.in_proj_{end}"] = torch.cat([p[f"{block}.{ours}.{part}_proj.{end}"] for part in "qkv"])
                state[f"{theirs}.out_proj.{end}"] = p[f"{block}.{ours}.o_proj.{end}"]
        state.update({f"{theirs}.{end}": p[f"{block}.{ours}.{end}"] for theirs, ours in names.items()})
    layer.load_state_dict(state)
    return layer


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_encoder_decoder_equals_torch_nn(norm_position):
    model, p = build(
        architecture="encoder-decoder",
        position="sinusoidal",
        bias=True,
        scale_embedding=True,
        num_encoder_layers=2,
        norm_position=norm_position,
    )
    source, target, source_lengths = tokens(2, 9), tokens(2, 6, seed=2), torch.tensor([9, 5])
    absent = torch.arange(9) >= source_lengths[:, None]
    later = torch.ones(6, 6).triu(1).bool()

    def embed(x):
        angles = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(0, 24, 2) / 24)
        return p["embedding.weight"][x] * 24**0.5 + torch.cat([angles.sin(), angles.cos()], -1)

    def final(h, stack):
        if norm_position == "post":
            return h
        return F.layer_norm(h, (24,), p[f"{stack}.norm.weight"], p[f"{stack}.norm.bias"])

    memory = embed(source)
    for i in range(2):
        layer = torch_layer(nn.TransformerEncoderLayer, p, f"encoder.blocks.{i}", norm_position == "pre")
        memory = layer(memory, src_key_padding_mask=absent)
    memory = final(memory, "encoder")
    hidden = embed(target)
    for i in range(3):
        layer = torch_layer(nn.TransformerDecoderLayer, p, f"stack.blocks.{i}", norm_position == "pre")
        hidden = layer(hidden, memory, tgt_mask=later, memory_key_padding_mask=absent)
    hidden = final(hidden, "stack")
    # Sinusoids are float32 here and there, by two formulas.
    ours = model(target, source=source, source_lengths=source_lengths)
    torch.testing.assert_close(ours, hidden, rtol=1e-5, atol=1e-5)
