"""Masks of every form, against torch's own attention with the same mask."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from warploom.nn.masked_attention import _read_mask, attend
from warploom.ops import REGISTRY


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected(q, k, v, mask, scale=None):
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def causal_mask(T, S, offset):
    return torch.arange(S) <= torch.arange(T)[:, None] + offset


B, H, T, S = 3, 4, 6, 9
LENGTHS = torch.tensor([9, 2, 5])
SEEN = (torch.arange(S) < LENGTHS[:, None])[:, None, None]
MASKS = {
    "all": torch.ones(1, 1, 1, S, dtype=torch.bool),
    "padding": SEEN,
    "padding_expanded": SEEN.expand(B, 1, T, S),
    "causal": causal_mask(T, S, S - T)[None, None],
    "causal_top_left": causal_mask(T, S, 0)[None, None],
    "causal_and_padding": causal_mask(T, S, S - T) & SEEN,
    "cache_of_fixed_size": (causal_mask(T, S, 1) & torch.ones(B, 1, 1, 1, dtype=torch.bool)),
    "left_padding": causal_mask(T, S, S - T) & (torch.arange(S) >= 3 * torch.arange(B)[:, None])[:, None, None],
    "window": (causal_mask(T, S, S - T) & ~causal_mask(T, S, S - T - 3))[None, None],
    "per_head": draw(1, H, T, S, seed=7) > -0.5,
    "sees_nothing": torch.zeros(B, 1, T, S, dtype=torch.bool),
    "additive": draw(1, 1, T, S, seed=8),
    "additive_per_row_and_head": draw(B, H, T, S, seed=8),
    "infinite": torch.zeros(B, 1, 1, S).masked_fill(~SEEN, float("-inf")),
    "least": torch.zeros(B, 1, T, S).masked_fill(~(causal_mask(T, S, -2) & SEEN), torch.finfo(torch.float32).min),
}
READ = {"all", "padding", "padding_expanded", "causal", "causal_top_left", "causal_and_padding", "cache_of_fixed_size"}
READ |= {"sees_nothing", "infinite"}


@pytest.mark.parametrize("H_kv", [4, 2])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, H_kv):
    mask = MASKS[name]
    leaves = [
        x.requires_grad_() for x in (draw(B, H, T, 16), draw(B, H_kv, S, 16, seed=1), draw(B, H_kv, S, 16, seed=2))
    ]
    do = draw(B, H, T, 16, seed=3)
    assert (_read_mask(mask, T, S) is not None) == (name in READ)
    before = REGISTRY["attention"].calls.total()
    o = attend(*leaves, [mask], scale=0.3)
    assert REGISTRY["attention"].calls.total() > before
    found = [o, *torch.autograd.grad(o, leaves, do)]
    o = expected(*leaves, mask, 0.3)
    for x, y in zip(found, [o, *torch.autograd.grad(o, leaves, do)], strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    "name", ["padding", "causal_and_padding", "left_padding", "cache_of_fixed_size", "sees_nothing"]
)
@pytest.mark.parametrize("rows", [1, B])
def test_masks_with_a_bias(name, rows):
    """As transformers adds T5's bias: where the mask hides a key, the bias is the least finite number."""
    q, k, v = draw(B, H, T, 16), draw(B, H, S, 16, seed=1), draw(B, H, S, 16, seed=2)
    bias = draw(rows, H, T, S, seed=4).requires_grad_()
    mask = MASKS[name]
    o = attend(q, k, v, [mask], bias=bias)
    (found,) = torch.autograd.grad(o.square().sum(), bias)
    total = torch.where(mask, bias, torch.finfo(torch.float32).min)
    right = F.scaled_dot_product_attention(q, k, v, attn_mask=total.expand(B, H, T, S))
    torch.testing.assert_close(o, right)
    torch.testing.assert_close(found, torch.autograd.grad(right.square().sum(), bias)[0])


def test_masks_are_joined():
    q, k, v = draw(B, H, S, 16), draw(B, H, S, 16, seed=1), draw(B, H, S, 16, seed=2)
    causal = causal_mask(S, S, 0)[None, None]
    right = expected(q, k, v, causal & SEEN)
    torch.testing.assert_close(attend(q, k, v, [causal, SEEN]), right)
    torch.testing.assert_close(attend(q, k, v, [SEEN], causal=True), right)
    infinite = torch.zeros(1, 1, S, S).masked_fill(~causal, float("-inf"))
    torch.testing.assert_close(attend(q, k, v, [infinite, SEEN]), right)
    window = MASKS["window"].new_ones(S, S).tril().triu(-3)[None, None]
    torch.testing.assert_close(attend(q, k, v, [window, SEEN]), expected(q, k, v, window & SEEN))
    late = causal_mask(S, S, -2)[None, None]  # two alignments, which the op cannot have at once
    torch.testing.assert_close(attend(q, k, v, [late], causal=True), expected(q, k, v, late))


def test_a_mask_that_changes_is_read_again():
    q, k, v = draw(B, H, T, 16), draw(B, H, S, 16, seed=1), draw(B, H, S, 16, seed=2)
    mask = SEEN.clone()
    attend(q, k, v, [mask])
    mask[:, :, :, 1:] = False
    torch.testing.assert_close(attend(q, k, v, [mask]), expected(q, k, v, mask))
    with torch.inference_mode():
        mask = SEEN.clone()
        torch.testing.assert_close(attend(q, k, v, [mask]), expected(q, k, v, mask))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_bool_mask(data):
    """What is read as causal and lengths is what the mask says."""
    T, S = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    offset, lengths = data.draw(st.integers(-2, 5)), data.draw(st.lists(st.integers(0, S), min_size=2, max_size=2))
    mask = (torch.arange(S) < torch.tensor(lengths)[:, None])[:, None, None] & causal_mask(T, S, offset)
    flipped = data.draw(st.sets(st.integers(0, mask.numel() - 1), max_size=2))
    mask.view(-1)[list(flipped)] ^= True
    q, k, v = draw(2, 2, T, 8), draw(2, 2, S, 8, seed=1), draw(2, 2, S, 8, seed=2)
    torch.testing.assert_close(attend(q, k, v, [mask]), expected(q, k, v, mask))


def test_autocast_and_dtypes():
    q, k, v = draw(B, H, T, 16), draw(B, H, S, 16, seed=1), draw(B, H, S, 16, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        o = attend(q, k.bfloat16(), v, [MASKS["additive"]])
        right = expected(q, k.bfloat16(), v, MASKS["additive"])
    assert o.dtype == right.dtype == torch.bfloat16
    # Torch rounds the mask to bf16 too.
    torch.testing.assert_close(o, right, rtol=2e-2, atol=2e-2)
    o = attend(q.half(), k.half(), v.half(), [MASKS["additive"].double()])
    torch.testing.assert_close(o.float(), expected(q, k, v, MASKS["additive"]), rtol=1e-2, atol=1e-2)
