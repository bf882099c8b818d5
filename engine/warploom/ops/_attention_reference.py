"""Attention in plain torch: the formula that every back end is held to, torch's own op for the same arguments, the back
end that runs anywhere, and the shapes that the operators return."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F


def attention_reference(
    q,
    k,
    v,
    *,
    causal=False,
    window=None,
    bias=None,
    cu_seqlens=None,
    cu_seqlens_k=None,
    key_lengths=None,
    softmax_scale=None,
):
    group = q.shape[1] // k.shape[1]
    wide = _stat_dtype(q)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    visible, rows, keys = layout(q, k, causal, window, cu_seqlens, cu_seqlens_k, key_lengths)
    k, v = (tensor.to(wide).repeat_interleave(group, 1) for tensor in (k, v))  # (B, H, S, D)
    s = scale * (q.to(wide) @ k.mT)  # (B, H, T, S)
    if bias is not None:
        s = s + _placed_bias(bias, rows, keys, cu_seqlens, q.shape[2]).to(wide)
    # Masked twice: a row that sees nothing is NaN after the softmax, in its gradient too.
    p = s.masked_fill(~visible, float("-inf")).softmax(-1).masked_fill(~visible, 0.0)
    return (p @ v).to(q.dtype)


def layout(q, k, causal, window, cu_seqlens, cu_seqlens_k, key_lengths):
    """Which query sees which key: bool, (1 or B, 1, T, S), and the place of each in its document: (T, 1) and (S,)."""
    T, S = q.shape[2], k.shape[2]
    rows, keys = torch.arange(T, device=q.device), torch.arange(S, device=q.device)
    shift = torch.tensor(S - T, device=q.device).expand(T)
    visible = torch.ones(T, S, dtype=torch.bool, device=q.device)
    if cu_seqlens is not None:
        cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        # An index into documents, of which empty ones have no token.
        of_row = torch.searchsorted(cu_seqlens[1:], rows.to(torch.int32), right=True)
        of_key = torch.searchsorted(cu_seqlens_k[1:], keys.to(torch.int32), right=True)
        visible = of_row[:, None] == of_key
        shift = (cu_seqlens_k.diff() - cu_seqlens.diff())[of_row]
        rows, keys = rows - cu_seqlens[of_row], keys - cu_seqlens_k[of_key]
    rows, past = rows[:, None], (rows + shift)[:, None] - keys
    if causal:
        visible = visible & (past >= 0)
    if window is not None:
        visible = visible & (past.abs() < window)
    visible = visible[None, None]
    if key_lengths is not None:
        visible = visible & (keys < key_lengths[:, None, None, None])
    return visible, rows, keys


def _placed_bias(bias, rows, keys, cu_seqlens, T):
    """The bias at each query and key, given their places; between documents it is any number."""
    if bias.dim() == 2:
        zero = T - 1 if cu_seqlens is None else bias.shape[1] // 2
        return bias[:, (zero + keys - rows).clamp(0, max(0, bias.shape[1] - 1))]
    return bias if cu_seqlens is None else bias[:, rows, keys]


def torch_peer(
    q,
    k,
    v,
    *,
    causal=False,
    window=None,
    bias=None,
    cu_seqlens=None,
    cu_seqlens_k=None,
    key_lengths=None,
    softmax_scale=None,
):
    grouped = q.shape[1] != k.shape[1]
    square = q.shape[2] == k.shape[2]
    mask = None
    masks = (window, bias, cu_seqlens, key_lengths)
    if any(option is not None for option in masks) or (causal and not square):
        mask, rows, keys = layout(q, k, causal, window, cu_seqlens, cu_seqlens_k, key_lengths)
        causal = False
        if bias is not None:
            placed = _placed_bias(bias, rows, keys, cu_seqlens, q.shape[2])
            mask = placed.to(q.dtype).masked_fill(~mask, float("-inf"))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=softmax_scale, enable_gqa=grouped
    )


def _stat_dtype(q):
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _documents(T, S, bias, cu_seqlens, cu_seqlens_k) -> Iterator[tuple[slice, slice, Any]]:
    """Rows, keys and index into the bias of each document; of the whole without cu_seqlens."""
    if cu_seqlens is None:
        yield slice(0, T), slice(0, S), _bias_index(T, S, bias, T - 1)
        return
    queries = cu_seqlens.tolist()
    keys = queries if cu_seqlens_k is None else cu_seqlens_k.tolist()
    for (a, b), (c, d) in zip(zip(queries, queries[1:], strict=False), zip(keys, keys[1:], strict=False), strict=True):
        yield slice(a, b), slice(c, d), None if bias is None else _bias_index(b - a, d - c, bias, bias.shape[1] // 2)


def _bias_index(n, m, bias, zero):
    """What takes (1 or H, n, m) out of the bias: its corner, or an entry per distance."""
    if bias is None or bias.dim() == 3:
        return slice(None), slice(0, n), slice(0, m)
    return slice(None), zero + torch.arange(m, device=bias.device) - torch.arange(n, device=bias.device)[:, None]


def _grouped(tensor, H_kv, wide):
    """(B, H, T, D) -> (B, H_kv, H / H_kv * T, D): the query heads of one key/value head as rows of one product."""
    B, H, T, D = tensor.shape
    return tensor.to(wide).reshape(B, H_kv, H // H_kv * T, D)


def _scores(q, k, bias, key_lengths, causal, window, softmax_scale):
    B, H, T, _ = q.shape
    H_kv, S = k.shape[1], k.shape[2]
    wide = _stat_dtype(q)
    s = (_grouped(q, H_kv, wide) @ k.to(wide).mT).mul_(softmax_scale).view(B, H, T, S)
    if bias is not None:
        s += bias
    if causal or window is not None or key_lengths is not None:
        s.masked_fill_(~layout(q, k, causal, window, None, None, key_lengths)[0], float("-inf"))
    return s


def reference_fwd(q, k, v, bias, cu_seqlens, cu_seqlens_k, key_lengths, *options):
    B, H, T, D = q.shape
    H_kv = k.shape[1]
    o, lse = fake_fwd(q, k, v, bias, cu_seqlens, cu_seqlens_k, key_lengths, *options)
    k, v = _without_padding(k, v, key_lengths)
    for rows, keys, index in _documents(T, k.shape[2], bias, cu_seqlens, cu_seqlens_k):
        of_document = None if bias is None else bias[index]
        s = _scores(q[:, :, rows], k[:, :, keys], of_document, key_lengths, *options)
        lse[:, :, rows] = s.logsumexp(-1)
        p = _probabilities(s, lse[:, :, rows])
        o[:, :, rows] = (_grouped(p, H_kv, p.dtype) @ v[:, :, keys].to(p.dtype)).view(B, H, p.shape[2], D)
    return o, lse


def _without_padding(k, v, key_lengths):
    """Zeros for the keys that are not seen: memory that was never written may hold NaN, and 0 * NaN is NaN."""
    if key_lengths is None:
        return k, v
    seen = (torch.arange(k.shape[2], device=k.device) < key_lengths[:, None])[:, None, :, None]
    return k.where(seen, 0.0), v.where(seen, 0.0)


def _probabilities(s, lse):
    """exp(s - lse) in place of s; zeros where a row sees nothing, whose lse is -inf."""
    return s.sub_(lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp_()


def reference_bwd(do, q, k, v, o, lse, bias, cu_seqlens, cu_seqlens_k, key_lengths, *options_and_need):
    *options, need_dbias = options_and_need
    softmax_scale = options[-1]
    B, H, T, D = q.shape
    H_kv, S = k.shape[1], k.shape[2]
    wide = lse.dtype
    dq, dk, dv, dbias = fake_bwd(do, q, k, v, o, lse, bias, cu_seqlens, cu_seqlens_k, key_lengths, *options_and_need)
    wide_dbias = torch.zeros_like(dbias, dtype=wide)
    k, v = _without_padding(k, v, key_lengths)
    for rows, keys, index in _documents(T, S, bias, cu_seqlens, cu_seqlens_k):
        of_document = None if bias is None else bias[index]
        s = _scores(q[:, :, rows], k[:, :, keys], of_document, key_lengths, *options)
        p = _probabilities(s, lse[:, :, rows])
        do_rows = _grouped(do[:, :, rows], H_kv, wide)
        dv[:, :, keys] = _grouped(p, H_kv, wide).mT @ do_rows
        dp = (do_rows @ v[:, :, keys].to(wide).mT).view_as(p)
        # Kernels take this sum as do . o, which needs no second pass over the keys but carries the rounding of o.
        delta = (p * dp).sum(-1, keepdim=True)  # (B, H, T, 1)
        ds = dp.sub_(delta).mul_(p)
        if need_dbias:
            of_bias = ds.sum(0).sum_to_size(bias.shape[0], *ds.shape[2:])
            if bias.dim() == 3:
                wide_dbias[index] += of_bias
            else:
                wide_dbias.index_add_(1, index[1].flatten(), of_bias.flatten(1))
        ds = _grouped(ds.mul_(softmax_scale), H_kv, wide)
        dq[:, :, rows] = (ds @ k[:, :, keys].to(wide)).view(B, H, p.shape[2], D)
        dk[:, :, keys] = ds.mT @ _grouped(q[:, :, rows], H_kv, wide)
    return dq, dk, dv, dbias.copy_(wide_dbias)


def fake_fwd(q, *others):
    return _empty_transposed(q), q.new_empty(q.shape[:3], dtype=_stat_dtype(q))


def fake_bwd(do, q, k, v, o, lse, bias, *others):
    need_dbias = others[-1]
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format) if need_dbias else q.new_empty(0)
    return _empty_transposed(q), _empty_transposed(k), _empty_transposed(v), dbias


def _empty_transposed(tensor):
    B, H, T, D = tensor.shape
    return tensor.new_empty((B, T, H, D)).transpose(1, 2)
