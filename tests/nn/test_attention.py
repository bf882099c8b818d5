import pytest
import torch
import torch.nn.functional as F

from warploom.nn import AttentionContext, CrossAttention, SelfAttention


def context(T, **changes):
    return AttentionContext(
        **{"positions": torch.arange(T), "rotate": lambda x, positions: x, "causal": True, **changes}
    )


def plain_attention(module, x, y, head_dim, **arguments):
    """The same through torch: y gives keys and values."""

    def heads(x, linear):
        return F.linear(x, linear.weight, linear.bias).unflatten(-1, (-1, head_dim)).transpose(1, 2)

    q, k, v = heads(x, module.q_proj), heads(y, module.k_proj), heads(y, module.v_proj)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    o = F.scaled_dot_product_attention(q, k, v, **arguments)
    return F.linear(o.transpose(1, 2).flatten(2), module.o_proj.weight, module.o_proj.bias)


@pytest.mark.parametrize("num_kv_heads", [None, 2, 1])
@pytest.mark.parametrize("head_dim", [None, 6])
@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_equals_torch(num_kv_heads, head_dim, bias):
    module = SelfAttention(16, 4, num_kv_heads, head_dim, bias).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    expected = plain_attention(module, x, x, head_dim or 4, is_causal=True)
    torch.testing.assert_close(module(x, context(7)), expected)


def test_self_attention_adds_the_bias_and_hides_keys():
    module = SelfAttention(16, 4).double()
    x, bias = torch.randn(2, 7, 16, dtype=torch.float64), torch.randn(4, 7, 7, dtype=torch.float64)
    lengths = torch.tensor([7, 3])
    seen = torch.arange(7) < lengths[:, None]
    mask = torch.where(seen[:, None, None], bias, -torch.inf)
    y = module(x, context(7, causal=False, bias=bias, key_lengths=lengths))
    torch.testing.assert_close(y, plain_attention(module, x, x, 4, attn_mask=mask))


def test_a_bias_for_each_row():
    module = SelfAttention(16, 4, num_kv_heads=2).double()
    x, bias = torch.randn(3, 5, 16, dtype=torch.float64), torch.randn(3, 4, 5, 5, dtype=torch.float64)
    lengths = torch.tensor([5, 2, 4])
    y = module(x, context(5, bias=bias, causal=False, key_lengths=lengths))
    for b in range(3):
        alone = module(x[b : b + 1], context(5, bias=bias[b], causal=False, key_lengths=lengths[b : b + 1]))
        torch.testing.assert_close(y[b : b + 1], alone)


def test_positions_turn_queries_and_keys_only():
    module = SelfAttention(16, 4).double()
    turned = []
    module(torch.randn(2, 3, 16, dtype=torch.float64), context(3, rotate=lambda x, positions: turned.append(x) or x))
    assert [x.shape for x in turned] == [(2, 4, 3, 4)] * 2


def test_cross_attention_equals_torch():
    module = CrossAttention(16, 4, num_kv_heads=2).double()
    x, memory = torch.randn(2, 3, 16, dtype=torch.float64), torch.randn(2, 6, 16, dtype=torch.float64)
    lengths = torch.tensor([6, 2])
    seen = (torch.arange(6) < lengths[:, None])[:, None, None]
    y = module(x, context(3, memory=memory, memory_lengths=lengths))
    torch.testing.assert_close(y, plain_attention(module, x, memory, 4, attn_mask=seen))


def test_cross_attention_projects_the_memory_once_per_cache():
    class Cache:
        cross = {}

    module = CrossAttention(16, 4, layer=3)
    x, memory = torch.randn(2, 3, 16), torch.randn(2, 6, 16)
    first = module(x, context(3, memory=memory, cache=Cache))
    assert [k.shape for k in Cache.cross[3]] == [(2, 4, 6, 4)] * 2
    torch.testing.assert_close(module(x, context(3, memory=None, cache=Cache)), first)
