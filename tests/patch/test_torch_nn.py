"""Patched layers of torch.nn compute what they did, on the ops."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from tests.patch.rule import calls, check_module, draw

import warploom
from warploom.ops import REGISTRY
from warploom.patch.swap import Swap

pytestmark = pytest.mark.skipif(
    REGISTRY["linear"].choice("cpu") == "reference", reason="without compiled kernels patch leaves every layer"
)


def check(model, inputs, ops, autocast=False, **options):
    """Output and gradients of the patched model are those of the plain one; each op in `ops` is called so often."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    patched = copy.deepcopy(model)
    report = warploom.patch(patched)
    check_module(patched, model, inputs, ops, autocast, **options)
    return report


@pytest.mark.parametrize(
    "module, op",
    [
        (nn.LayerNorm(24), "layer_norm"),
        (nn.LayerNorm(24, eps=0.1, bias=False), "layer_norm"),
        (nn.RMSNorm(24), "rms_norm"),
        (nn.RMSNorm(24, eps=0.1), "rms_norm"),
    ],
    ids=repr,
)
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch tells where it is slow
def test_norms(module, op):
    check(module, [draw(2, 5, 24)], {op: 1})
    for autocast in (False, True):
        check(module, [draw(2, 5, 24).bfloat16()], {op: 1}, autocast)
    check(module.double(), [draw(2, 5, 24).double()], {op: 1})


@pytest.mark.parametrize(
    "module, reason",
    [
        (nn.LayerNorm((4, 6)), "it normalises over 2 dimensions"),
        (nn.LayerNorm(6, elementwise_affine=False), "it has no weight (elementwise_affine=False)"),
        (nn.MultiheadAttention(8, 2, dropout=0.1), "dropout 0.1 on attention probabilities"),
        (nn.MultiheadAttention(8, 2, add_zero_attn=True), "it adds a key (add_bias_kv or add_zero_attn)"),
        (nn.MultiheadAttention(8, 2, add_bias_kv=True), "it adds a key (add_bias_kv or add_zero_attn)"),
    ],
    ids=str,
)
def test_what_is_left_says_why(module, reason):
    report = warploom.patch(module)
    assert report.swapped == () and [entry.reason for entry in report.left] == [reason]
    assert str(report).endswith(f"{reason}: the model itself")


def test_a_machine_without_the_kernel_is_left_alone(monkeypatch):
    backends = {**REGISTRY["layer_norm"].backends}
    backends.pop("cpu")
    monkeypatch.setattr(REGISTRY["layer_norm"], "backends", backends)
    report = warploom.patch(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)))
    assert [entry.kind for entry in report.swapped] == ["linear"]
    assert [entry.reason for entry in report.left] == [
        "layer_norm has no kernel for cpu on this machine, see warploom doctor"
    ]


def test_something_that_is_no_module():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict"):
        warploom.patch({})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_sequential(bias, autocast):
    gelu = nn.GELU(approximate="tanh")
    model = nn.Sequential(
        *(nn.Linear(8, 16, bias), nn.ReLU(), nn.Dropout(0.0), nn.Linear(16, 8, bias), gelu),
        *(nn.Linear(8, 8, bias), nn.GELU(), nn.ReLU()),
    )
    report = check(model, [draw(2, 5, 8)], {"linear": 3}, autocast)
    assert [(entry.path, entry.kind) for entry in report.swapped] == [
        *(("0", "linear + relu"), ("3", "linear + gelu_tanh"), ("5", "linear + gelu")),
        *(("0", "linear"), ("3", "linear"), ("5", "linear")),
    ]


def test_children_of_a_sequential_stay_what_they_are():
    """Called one by one, sliced, or watched by a hook, they return what they did."""
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU()), draw(5, 8)
    expected, h = model(x), F.linear(x, model[0].weight, model[0].bias)
    warploom.patch(model)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model[0](x), h)
    torch.testing.assert_close(model[:1](x), h)
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(seen[0], h)


MASKS = {
    "none": {},
    "padding": {"key_padding_mask": torch.tensor([[False] * 7, [False] * 4 + [True] * 3])},
    "left_padding": {"key_padding_mask": torch.tensor([[False] * 7, [True] * 3 + [False] * 4])},
    "causal": {"attn_mask": nn.Transformer.generate_square_subsequent_mask(7), "is_causal": True},
    "causal_without_hint": {"attn_mask": torch.ones(7, 7, dtype=torch.bool).triu(1)},
    "additive": {"attn_mask": draw(7, 7, seed=5)},
    "per_head": {"attn_mask": draw(2 * 4, 7, 7, seed=5)},
    "both": {
        "attn_mask": torch.ones(7, 7, dtype=torch.bool).triu(1),
        "key_padding_mask": torch.tensor([[False] * 7, [False] * 4 + [True] * 3]),
    },
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", MASKS)
def test_self_attention(name, batch_first):
    model = nn.MultiheadAttention(16, 4, batch_first=batch_first)
    x = draw(2, 7, 16) if batch_first else draw(7, 2, 16)

    class SelfAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = model

        def forward(self, x, **options):
            return self.attention(x, x, x, need_weights=False, **options)

    attention_calls = 2 if name in ("left_padding", "per_head") else 1
    check(SelfAttention(), [x], {"linear": 2, "attention": attention_calls}, **MASKS[name])


@pytest.mark.parametrize(
    "model", [nn.MultiheadAttention(16, 4), nn.MultiheadAttention(16, 4, bias=False, kdim=8, vdim=12)]
)
@pytest.mark.parametrize("batched", [True, False])
def test_cross_attention(model, batched):
    widths = (16, 16, 16) if model._qkv_same_embed_dim else (16, 8, 12)
    inputs = [draw(length, 2, width, seed=width) for length, width in zip((7, 5, 5), widths, strict=True)]
    if not batched:
        inputs = [x[:, 0] for x in inputs]
    check(model, inputs, {"linear": 4, "attention": 1}, need_weights=False)


def test_attention_weights_are_torchs():
    model = nn.MultiheadAttention(16, 4, batch_first=True)
    patched = copy.deepcopy(model)
    warploom.patch(patched)
    x = draw(2, 7, 16)
    expected, found = model(x, x, x), patched(x, x, x)
    assert torch.equal(expected[0], found[0]) and torch.equal(expected[1], found[1])


def test_a_module_of_warploom_is_on_the_ops_already():
    model = nn.ModuleDict({"ours": warploom.nn.MultiheadAttention(16, 4), "norm": warploom.nn.LayerNorm(16)})
    report = warploom.patch(model)
    assert report.swapped == () and report.left == ()


LAYER = dict(d_model=16, nhead=4, dim_feedforward=32, dropout=0.0)


@pytest.mark.parametrize(
    "options", [dict(), dict(batch_first=True), dict(norm_first=True), dict(activation=nn.ReLU())], ids=str
)
@pytest.mark.parametrize("autocast", [False, True])
def test_encoder_and_decoder_layers(options, autocast):
    x, memory = draw(7, 7, 16), draw(7, 7, 16, seed=1)
    ops = {"linear": 4, "attention": 1, "layer_norm": 2}
    report = check(nn.TransformerEncoderLayer(**LAYER, **options), [x], ops, autocast)
    assert ("", "linear + relu") in [(entry.path, entry.kind) for entry in report.swapped]
    ops = {"linear": 8, "attention": 2, "layer_norm": 3}
    check(nn.TransformerDecoderLayer(**LAYER, **options), [x, memory], ops, autocast)


@pytest.mark.parametrize("activation", ["gelu", F.elu])
def test_an_encoder_says_what_becomes_of_its_activation(activation):
    ops = {"linear": 4, "attention": 1, "layer_norm": 2}
    report = check(nn.TransformerEncoderLayer(**LAYER, activation=activation), [draw(7, 2, 16)], ops)
    if activation == "gelu":
        assert not report.left and ("", "linear + gelu") in [(entry.path, entry.kind) for entry in report.swapped]
    else:
        assert [(entry.path, entry.reason) for entry in report.left] == [("linear1", "no kernel has elu in it")]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("training", [True, False])
def test_transformer(training):
    """Also where torch would take its fused inference path, which reads the weights and passes the layers by."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # enable_nested_tensor and norm_first
        model = nn.Transformer(16, 4, 2, 2, 32, dropout=0.0, batch_first=True).train(training)
    padding = MASKS["padding"]["key_padding_mask"]
    options = dict(src_key_padding_mask=padding, memory_key_padding_mask=padding, tgt_is_causal=True)
    options["tgt_mask"] = nn.Transformer.generate_square_subsequent_mask(5)
    ops = {"linear": 2 * 4 + 2 * 8, "attention": 6, "layer_norm": 2 * 2 + 1 + 2 * 3 + 1}
    with torch.set_grad_enabled(training):
        check(model, [draw(2, 7, 16), draw(2, 5, 16, seed=1)], ops, **options)


def test_dropout_of_attention_while_training_is_torchs():
    model = nn.MultiheadAttention(16, 4)
    warploom.patch(model)
    model.dropout = 0.5  # after the patch
    x = draw(7, 2, 16)
    before = calls("attention")
    torch.manual_seed(0)
    dropped = model(x, x, x, need_weights=False)[0]
    assert calls("attention") == before
    torch.testing.assert_close(model.eval()(x, x, x, need_weights=False)[0], model(x, x, x)[0])
    assert calls("attention") == before + 1
    assert not torch.allclose(dropped, model(x, x, x)[0])


def test_copies_pickles_repr_and_unpatch():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(**LAYER), 2, enable_nested_tensor=False)
    classes, keys = [type(module) for module in model.modules()], list(model.state_dict())
    x = draw(7, 2, 16)
    before = model(x)
    warploom.patch(model)
    assert "warploom LayerNorm" in repr(model)
    found = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
        assert list(twin.state_dict()) == keys and torch.equal(twin(x), found)
        warploom.unpatch(twin)
        assert [type(module) for module in twin.modules()] == classes and torch.equal(twin(x), before)
    assert isinstance(model.layers[0].norm1, Swap) and isinstance(model.layers[0].norm1, nn.LayerNorm)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_a_break():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(**LAYER), 1, enable_nested_tensor=False)
    warploom.patch(model)
    x, padding = draw(7, 2, 16), MASKS["left_padding"]["key_padding_mask"]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(
        compiled(x, src_key_padding_mask=padding), model(x, src_key_padding_mask=padding), rtol=1e-4, atol=1e-4
    )
    torch.compiler.reset()
