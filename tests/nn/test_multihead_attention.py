"""MultiheadAttention is torch.nn's, on the ops: what it computes, how it is saved, where torch's own forward runs."""

import copy
import inspect

import pytest
import torch
import torch.nn as nn
from tests.patch.rule import calls, check_module, draw

from warploom.nn import MultiheadAttention

T, S, B, C, H = 7, 5, 2, 16, 4
CAUSAL = torch.ones(T, T, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
MASKS = {
    "none": {},
    "padding": {"key_padding_mask": PADDING},
    "padding_additive": {"key_padding_mask": draw(B, T, seed=3)},
    "causal_hint": {"attn_mask": nn.Transformer.generate_square_subsequent_mask(T), "is_causal": True},
    "causal_hint_and_padding": {"attn_mask": CAUSAL, "key_padding_mask": PADDING, "is_causal": True},
    "bool": {"attn_mask": (draw(T, T, seed=4) > 0).fill_diagonal_(False)},
    "additive": {"attn_mask": draw(T, T, seed=5)},
    "transposed": {"attn_mask": draw(T, T, seed=5).t()},
    "per_head_bool": {"attn_mask": (draw(B * H, T, T, seed=6) > 0) & CAUSAL},
    "per_head": {"attn_mask": draw(B * H, T, T, seed=5)},
}
CALLS_BY_ROW = {"padding_additive", "per_head_bool", "per_head"}  # whose masks differ by row: one call for each


class SelfAttention(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x, **options):
        return self.attention(x, x, x, **options)


def pair(*arguments, **options):
    """Ours and torch's, with the same weights: torch's are loaded into ours."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(*arguments, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = MultiheadAttention(*arguments, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def self_attention(batch_first=False):
    ours, theirs = pair(C, H, batch_first=batch_first)
    return SelfAttention(ours), SelfAttention(theirs)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, batch_first):
    x = draw(B, T, C) if batch_first else draw(T, B, C)
    ops = {"linear": 2, "attention": B if name in CALLS_BY_ROW else 1}
    check_module(*self_attention(batch_first), [x], ops, need_weights=False, **MASKS[name])


@pytest.mark.parametrize("options", [{}, {"bias": False, "kdim": 8, "vdim": 12}, {"kdim": 8}, {"batch_first": True}])
@pytest.mark.parametrize("batched", [True, False])
def test_keys_and_values_of_another_sequence(options, batched):
    ours, theirs = pair(C, H, **options)
    shapes = [(T, B, C), (S, B, ours.kdim), (S, B, ours.vdim)]
    inputs = [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    padding = torch.tensor([[False] * S, [False] * 3 + [True] * 2])
    if ours.batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    if not batched:
        inputs, padding = [x.select(0 if ours.batch_first else 1, 0) for x in inputs], padding[1]
    for masks in ({}, {"key_padding_mask": padding}, {"attn_mask": draw(T, S, seed=9)}):
        check_module(ours, theirs, inputs, {"linear": 4, "attention": 1}, need_weights=False, **masks)


def test_one_sequence_without_a_batch():
    per_head = {"attn_mask": draw(H, T, T, seed=5)}
    for masks in ({}, {"key_padding_mask": PADDING[1]}, MASKS["causal_hint"], per_head):
        check_module(*self_attention(), [draw(T, C)], {"linear": 2, "attention": 1}, need_weights=False, **masks)


def test_autocast_and_evaluation():
    ours, theirs = self_attention(batch_first=True)
    ops = {"linear": 2, "attention": 1}
    check_module(ours, theirs, [draw(B, T, C)], ops, autocast=True, need_weights=False)
    with torch.no_grad():  # where torch's own has a fused path
        check_module(ours.eval(), theirs.eval(), [draw(B, T, C)], ops, need_weights=False)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("name", ["none", "padding", "additive"])
def test_attention_weights_are_torchs(name, average):
    ours, theirs = self_attention()
    x, options = draw(T, B, C), dict(average_attn_weights=average, **MASKS[name])
    before = calls("attention")
    found, expected = ours(x, **options), theirs(x, **options)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert calls("attention") == before


@pytest.mark.parametrize("options", [{"add_zero_attn": True}, {"add_bias_kv": True}, {"dropout": 0.5}], ids=str)
def test_what_the_op_has_not_is_torchs(options):
    ours, theirs = pair(C, H, **options)
    x = draw(T, B, C)
    before, results = calls("attention"), []
    for module in (ours, theirs):
        torch.manual_seed(1)
        results.append(module(x, x, x, need_weights=False)[0])
    assert torch.equal(*results) and calls("attention") == before
    ours.eval()(x, x, x, need_weights=False)
    assert calls("attention") == before + ("dropout" in options)


def test_it_is_constructed_called_and_saved_as_torchs():
    for method in ("__init__", "forward"):
        ours, theirs = (inspect.signature(getattr(cls, method)) for cls in (MultiheadAttention, nn.MultiheadAttention))
        assert [(p.name, p.default, p.kind) for p in ours.parameters.values()] == [
            (p.name, p.default, p.kind) for p in theirs.parameters.values()
        ]
    for options in ({}, {"bias": False}, {"kdim": 8, "vdim": 12}, {"add_bias_kv": True}):
        ours, theirs = pair(C, H, **options)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(copy.deepcopy(ours).state_dict())
    torch.manual_seed(3)
    ours = MultiheadAttention(C, H, dtype=torch.float64)
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(C, H, dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"is_causal": True}, RuntimeError, "Need attn_mask if specifying the is_causal hint"),
        ({"attn_mask": torch.zeros(S, T)}, RuntimeError, "shape of the 2D attn_mask"),
        ({"attn_mask": torch.zeros(H, T, S)}, RuntimeError, "shape of the 3D attn_mask"),
        ({"attn_mask": torch.zeros(T, S, dtype=torch.uint8)}, AssertionError, "only bool and floating types"),
        ({"key_padding_mask": torch.zeros(S, B, dtype=torch.bool)}, AssertionError, "Expected key_padded_mask.shape"),
    ],
    ids=["hint_alone", "shape", "shape_per_head", "integers", "padding_shape"],
)
def test_masks_that_do_not_fit_are_torchs_errors(options, error, match):
    """Those of another shape have as many elements as the right one, and could be read as it."""
    ours, _ = pair(C, H)
    with pytest.raises(error, match=match):
        ours(draw(T, B, C), draw(S, B, C), draw(S, B, C), need_weights=False, **options)


def test_keys_and_values_that_do_not_fit_are_torchs_errors():
    ours, _ = pair(C, H)
    query = draw(T, B, C)
    for key, value in ((draw(S, B, C), draw(S + 1, B, C)), (draw(S, 1, C), draw(S, 1, C)), (draw(S, C), draw(S, C))):
        with pytest.raises((AssertionError, RuntimeError)):
            ours(query, key, value, need_weights=False)
