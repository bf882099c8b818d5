"""Attention on shapes nobody chose: ragged lengths, groups of heads, packed documents, padding."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from warploom.ops import REGISTRY, backend
from warploom.ops._accuracy import Trial
from warploom.ops._attention_reference import layout
from warploom.ops._op import Case
from warploom.ops.attention import attention

OP = REGISTRY["attention"]
BACKENDS = [name for name in OP.backends if OP.refusal(name, "cpu") is None]


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@st.composite
def attention_cases(draw):
    groups, H_kv = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    D = draw(st.sampled_from([1, 8, 20, 64, 96]))
    masks = {"causal": draw(st.booleans()), "window": draw(st.none() | st.integers(1, 150))}
    form = draw(st.sampled_from(["packed", "packed_cross", "lengths", "plain"]))
    if form.startswith("packed"):
        lengths = st.lists(st.integers(0, 70), min_size=1, max_size=4)
        queries = draw(lengths.filter(any))
        sizes = st.lists(st.integers(0, 70), min_size=len(queries), max_size=len(queries))
        keys = queries if form == "packed" else draw(sizes.filter(any))
        B, T, S = 1, sum(queries), sum(keys)
        n, m = max(queries), max(keys)
        masks["cu_seqlens"] = offsets(queries)
        if form == "packed_cross":
            masks["cu_seqlens_k"] = offsets(keys)
    else:
        # Few queries take another path than many.
        B, T = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2]) | st.integers(1, 140))
        n, m = T, S = T, draw(st.integers(1, 140))
        if form == "lengths":
            lengths = draw(st.lists(st.integers(0, S), min_size=B, max_size=B))
            masks["key_lengths"] = torch.tensor(lengths, dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    # Where no query sees two keys, the gradients of q and k are zero: what a kernel returns there is the difference of
    # two equal sums of D products, whose rounding depends on their order, and no peer says how large it may be.
    q, k = torch.empty(B, 1, T, D), torch.empty(B, 1, S, D)
    rest = {"cu_seqlens": None, "cu_seqlens_k": None, "key_lengths": None}
    visible, *_ = layout(q, k, **{**rest, **masks})
    assume(bool((visible.sum(-1) > 1).any()))
    shapes = {"q": (B, groups * H_kv, T, D), "k": (B, H_kv, S, D), "v": (B, H_kv, S, D)}
    bias = draw(st.sampled_from([None, "pairs", "distances"]))
    heads = draw(st.sampled_from([1, groups * H_kv]))
    if bias == "pairs":
        shapes["bias"] = (heads, n, m)
    elif bias == "distances":
        shapes["bias"] = (heads, 2 * max(n, m) - 1 if "cu_seqlens" in masks else T + S - 1)

    def make(generator):
        tensors = {key: torch.randn(size, generator=generator, dtype=torch.float64) for key, size in shapes.items()}
        return {**tensors, **masks}

    return Case(f"{shapes} {masks}", make, no_grad=draw(st.sampled_from([(), ("bias",)])))


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
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
@pytest.mark.parametrize("causal", [False, True])
def test_a_bias_by_distance_is_that_bias_of_pairs(name, causal):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 16, generator=generator) for n in (20, 33, 33))
    table = torch.randn(4, 52, generator=generator)

    def run(form):
        leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v, table)]
        bias = leaves[3]
        if form == "pairs":
            bias = bias[:, 19 + torch.arange(33) - torch.arange(20)[:, None]]
        with backend(attention=name):
            o = attention(*leaves[:3], bias=bias, causal=causal)
            return [o.detach(), *torch.autograd.grad(o.square().sum(), leaves)]

    for by_distance, by_pair in zip(run("distances"), run("pairs"), strict=True):
        torch.testing.assert_close(by_distance, by_pair)


def test_a_bias_without_gradient_has_none_computed():
    """The sums for it are the larger part of a backward pass with a bias."""
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 9)
    wanted = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.warploom.attention_bwd.default:
                wanted.append(args[-1])
            return func(*args, **(kwargs or {}))

    with Recorder():
        attention(q, k, v, bias=bias).sum().backward()
        attention(q, k, v, bias=bias.requires_grad_()).sum().backward()
    assert wanted == [False, True]


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
        _, lse = torch.ops.warploom.attention_fwd(q, k, v, None, None, None, torch.tensor([3]), True, None, 0.5)
    visible = torch.ones(5, 5).tril().bool() & (torch.arange(5) < 3)
    s = (0.5 * q @ k.mT).masked_fill(~visible, float("-inf"))
    torch.testing.assert_close(lse, s.logsumexp(-1))
    with backend(attention=name):
        _, lse = torch.ops.warploom.attention_fwd(q, k, v, None, None, None, torch.tensor([0]), True, None, 0.5)
    assert (lse == float("-inf")).all() and lse.dtype == torch.float32
