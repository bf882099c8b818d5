"""Attention on shapes nobody chose: ragged lengths, groups of heads, packed documents, padding."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from warploom.ops import REGISTRY, backend
from warploom.ops._accuracy import Trial
from warploom.ops._op import Case
from warploom.ops.attention import _visible, attention

OP = REGISTRY["attention"]
BACKENDS = [name for name in OP.backends if OP.refusal(name, "cpu") is None]


@st.composite
def attention_cases(draw):
    groups, H_kv = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    D = draw(st.sampled_from([1, 8, 20, 64, 96]))
    causal = draw(st.booleans())
    bias = draw(st.booleans())
    form = draw(st.sampled_from(["packed", "lengths", "plain"]))
    inputs = {"causal": causal}
    if form == "packed":
        documents = draw(st.lists(st.integers(0, 70), min_size=1, max_size=4).filter(any))
        B, T = 1, sum(documents)
        S, corner = T, max(documents)
        inputs["cu_seqlens"] = torch.tensor([0, *documents]).cumsum(0).to(torch.int32)
    else:
        B, T, S = draw(st.integers(1, 3)), draw(st.integers(1, 140)), draw(st.integers(1, 140))
        if form == "lengths":
            lengths = draw(st.lists(st.integers(0, S), min_size=B, max_size=B))
            inputs["key_lengths"] = torch.tensor(lengths, dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    # Where no query sees two keys, the gradients of q and k are zero: what a kernel returns there is the difference of
    # two equal sums of D products, whose rounding depends on their order, and no peer says how large it may be.
    q, k = torch.empty(B, 1, T, D), torch.empty(B, 1, S, D)
    visible = _visible(q, k, causal, inputs.get("cu_seqlens"), inputs.get("key_lengths"))
    assume(bool((visible.sum(-1) > 1).any()))
    shapes = {"q": (B, groups * H_kv, T, D), "k": (B, H_kv, S, D), "v": (B, H_kv, S, D)}
    if bias:
        heads = draw(st.sampled_from([1, groups * H_kv]))
        shapes["bias"] = (heads, corner, corner) if form == "packed" else (heads, T, S)

    def make(generator):
        tensors = {key: torch.randn(size, generator=generator, dtype=torch.float64) for key, size in shapes.items()}
        return {**tensors, **inputs}

    return Case(f"{shapes} {inputs}", make)


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(case=attention_cases(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_shape(name, case, dtype):
    trial = Trial(OP, case, dtype)
    with backend(attention=name):
        results = trial.evaluate(attention)
    wrong = [str(deviation) for deviation in trial.deviations(results) if not deviation.acceptable]
    assert not wrong, f"{case.name}: {wrong}"


@pytest.mark.parametrize("name", BACKENDS)
def test_equals_torch_sdpa_when_square(name):
    """The alignment of causal agrees with torch's, so that models can swap one for the other."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 50, 32, generator=generator) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    with backend(attention=name):
        torch.testing.assert_close(attention(q, k, v, causal=True), expected)


@pytest.mark.parametrize("name", BACKENDS)
def test_padding_is_never_read(name):
    """NaN behind key_lengths reaches neither the output nor a gradient of what is seen."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 40, 16, generator=generator) for _ in range(3))
    lengths = torch.tensor([40, 13])

    def run(k, v):
        leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        with backend(attention=name):
            o = attention(*leaves, key_lengths=lengths)
            return [o.detach(), *torch.autograd.grad(o.sum(), leaves)]

    clean = run(k, v)
    k[1, :, 13:], v[1, :, 13:] = float("nan"), float("nan")
    o, dq, dk, dv = run(k, v)
    torch.testing.assert_close(o, clean[0])
    torch.testing.assert_close(dq, clean[1])
    torch.testing.assert_close(dk[1, :, :13], clean[2][1, :, :13])
    assert not dk[1, :, 13:].any() and not dv[1, :, 13:].any()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_row_that_sees_nothing_gives_zeros(name):
    q, k, v = (torch.ones(1, 2, 3, 8, requires_grad=True) for _ in range(3))
    with backend(attention=name):
        o = attention(q, k, v, key_lengths=torch.tensor([0]))
        gradients = torch.autograd.grad(o.sum(), (q, k, v))
    assert not o.any()
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("name", BACKENDS)
def test_log_sum_exp_is_returned(name):
    """The statistic that kernels of other back ends read."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 8, generator=generator) for _ in range(3))
    with backend(attention=name):
        _, lse = torch.ops.warploom.attention_fwd(q, k, v, None, None, torch.tensor([3]), True, 0.5)
    visible = torch.ones(5, 5).tril().bool() & (torch.arange(5) < 3)
    s = (0.5 * q @ k.mT).masked_fill(~visible, float("-inf"))
    torch.testing.assert_close(lse, s.logsumexp(-1))
    with backend(attention=name):
        _, lse = torch.ops.warploom.attention_fwd(q, k, v, None, None, torch.tensor([0]), True, 0.5)
    assert (lse == float("-inf")).all() and lse.dtype == torch.float32
