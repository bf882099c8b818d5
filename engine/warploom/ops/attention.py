"""o = softmax(softmax_scale * q k^T + bias) v per head, over the keys a query sees (Vaswani et al., 2017).

Online softmax over key blocks, with log-sum-exp saved for the backward pass: Dao et al., 2022. Grouped key/value heads:
Ainslie et al., 2023. Every tensor shaped like q, k or v that an operator returns is laid out so that its
transpose(1, 2) is contiguous: the (B, T, H, D) that the projections around attention read and write.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from warploom.ops import _extension
from warploom.ops._op import Backend, BadCase, BenchCase, Case, Op


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_lengths: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """Return softmax(softmax_scale * q k^T + bias) v, (B, H, T, D) in q's dtype.

    q: (B, H, T, D); k, v: (B, H_kv, S, D), where H_kv divides H: query head h reads key/value head h // (H // H_kv).
    One floating dtype; softmax runs in float32 (float64 for float64). softmax_scale: 1 / sqrt(D) if None.
    causal: query i sees the keys j <= i + (S - T), so that the last query sees every key.
    bias: (1 or H, T, S), of q's dtype or float32, added after the scaling; it gets a gradient.
    key_lengths: (B,) int32 or int64 in [0, S]; the keys from key_lengths[b] on are not seen, whatever they hold.
    cu_seqlens: (number of documents + 1,) int32, the offsets of the documents packed into one row, from 0 to T; needs
    B == 1 and T == S. Documents do not see each other, and each takes the top-left corner of bias, which then is
    (1 or H, n, m) with n and m at least the longest document.
    A query that sees no key gets zeros and gives no gradient.
    Raises ValueError for a wrong shape or value (values are read on the CPU only), TypeError for a wrong dtype.
    """
    _check_shapes(q, k, v, bias, cu_seqlens, key_lengths)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return _Attention.apply(q, k, v, bias, cu_seqlens, key_lengths, causal, scale)


def _check_shapes(q, k, v, bias, cu_seqlens, key_lengths):
    if q.dim() != 4 or q.shape[-1] == 0:
        raise ValueError(f"q must be (B, H, T, D) with D at least 1, got shape {tuple(q.shape)}")
    if not q.is_floating_point():
        raise TypeError(f"q must be floating point, got {q.dtype}")
    B, H, T, D = q.shape
    if k.dim() != 4 or k.shape[0] != B or k.shape[3] != D or k.shape[1] == 0 or H % k.shape[1]:
        raise ValueError(
            f"k must be (B, H_kv, S, D) with H_kv dividing H to match q {tuple(q.shape)}, got {tuple(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v must be {tuple(k.shape)} as k is, got {tuple(v.shape)}")
    S = k.shape[2]
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must be {q.dtype} as q is, got {tensor.dtype}")
    for name, tensor in (("k", k), ("v", v), ("bias", bias), ("cu_seqlens", cu_seqlens), ("key_lengths", key_lengths)):
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{name} must be on {q.device} as q is, got {tensor.device}")
    if cu_seqlens is not None:
        if key_lengths is not None:
            raise ValueError("cu_seqlens and key_lengths exclude each other, got both")
        if B != 1 or T != S:
            raise ValueError(
                f"cu_seqlens needs B == 1 and as many keys as queries, got q {tuple(q.shape)}, k {tuple(k.shape)}"
            )
        if cu_seqlens.dtype != torch.int32:
            raise TypeError(f"cu_seqlens must be torch.int32, got {cu_seqlens.dtype}")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            raise ValueError(f"cu_seqlens must be (documents + 1,), got {tuple(cu_seqlens.shape)}")
    if key_lengths is not None:
        if key_lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"key_lengths must be torch.int32 or torch.int64, got {key_lengths.dtype}")
        if key_lengths.shape != (B,):
            raise ValueError(f"key_lengths must be ({B},) to match q {tuple(q.shape)}, got {tuple(key_lengths.shape)}")
    if bias is not None:
        if bias.dtype not in (q.dtype, torch.float32):
            raise TypeError(f"bias must be {q.dtype} as q is or torch.float32, got {bias.dtype}")
        if bias.dim() != 3 or bias.shape[0] not in (1, H) or (cu_seqlens is None and bias.shape[1:] != (T, S)):
            raise ValueError(f"bias must be (1 or {H}, {T}, {S}), got {tuple(bias.shape)}")


def _check_values(q, k, v, bias, cu_seqlens, key_lengths, causal, softmax_scale):
    """The back ends trust these as memory offsets."""
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
        T = q.shape[2]
        if offsets[0] != 0 or offsets[-1] != T or any(a > b for a, b in zip(offsets, offsets[1:], strict=False)):
            raise ValueError(f"cu_seqlens must rise from 0 to T = {T}, got {offsets}")
        if bias is not None:
            longest = max(b - a for a, b in zip(offsets, offsets[1:], strict=False))
            if min(bias.shape[1:]) < longest:
                raise ValueError(
                    f"bias must cover the longest document, {longest} tokens, got shape {tuple(bias.shape)}"
                )
    if key_lengths is not None:
        S = k.shape[2]
        if any(not 0 <= length <= S for length in key_lengths.tolist()):
            raise ValueError(f"key_lengths must be in [0, S = {S}], got {key_lengths.tolist()}")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, cu_seqlens, key_lengths, causal, softmax_scale):
        o, lse = torch.ops.warploom.attention_fwd.default(q, k, v, bias, cu_seqlens, key_lengths, causal, softmax_scale)
        ctx.save_for_backward(q, k, v, o, lse, bias, cu_seqlens, key_lengths)
        ctx.causal, ctx.softmax_scale = causal, softmax_scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse, bias, cu_seqlens, key_lengths = ctx.saved_tensors
        dq, dk, dv, dbias = torch.ops.warploom.attention_bwd.default(
            do, q, k, v, o, lse, bias, cu_seqlens, key_lengths, ctx.causal, ctx.softmax_scale
        )
        return dq, dk, dv, None if bias is None else dbias, None, None, None, None


def attention_reference(q, k, v, *, causal=False, bias=None, cu_seqlens=None, key_lengths=None, softmax_scale=None):
    group = q.shape[1] // k.shape[1]
    wide = _stat_dtype(q)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    k, v = (tensor.to(wide).repeat_interleave(group, 1) for tensor in (k, v))  # (B, H, S, D)
    s = scale * (q.to(wide) @ k.mT)  # (B, H, T, S)
    if bias is not None:
        s = s + _placed_bias(bias, cu_seqlens, q.shape[2]).to(wide)
    visible = _visible(q, k, causal, cu_seqlens, key_lengths)
    # Masked twice: a row that sees nothing is NaN after the softmax, in its gradient too.
    p = s.masked_fill(~visible, float("-inf")).softmax(-1).masked_fill(~visible, 0.0)
    return (p @ v).to(q.dtype)


def _visible(q, k, causal, cu_seqlens, key_lengths):
    """Which query sees which key: bool, (1 or B, 1, T, S)."""
    T, S = q.shape[2], k.shape[2]
    rows, keys = torch.arange(T, device=q.device)[:, None], torch.arange(S, device=q.device)
    visible = (keys <= rows + (S - T)) if causal else torch.ones(T, S, dtype=torch.bool, device=q.device)
    visible = visible[None, None]
    if cu_seqlens is not None:
        document = torch.searchsorted(cu_seqlens[1:], keys.to(torch.int32), right=True)
        visible = visible & (document[:, None] == document)
    if key_lengths is not None:
        visible = visible & (keys < key_lengths[:, None, None, None])
    return visible


def _placed_bias(bias, cu_seqlens, T):
    """The bias at each (query, key) of the packed row; what stands between documents is never seen."""
    if cu_seqlens is None:
        return bias
    tokens = torch.arange(T, device=bias.device, dtype=torch.int32)
    position = tokens - cu_seqlens[torch.searchsorted(cu_seqlens[1:], tokens, right=True)]
    return bias[:, position[:, None], position]


def _torch_peer(q, k, v, *, causal=False, bias=None, cu_seqlens=None, key_lengths=None, softmax_scale=None):
    grouped = q.shape[1] != k.shape[1]
    square = q.shape[2] == k.shape[2]
    mask = None
    if bias is not None or cu_seqlens is not None or key_lengths is not None or (causal and not square):
        mask = _visible(q, k, causal, cu_seqlens, key_lengths)
        causal = False
        if bias is not None:
            mask = _placed_bias(bias, cu_seqlens, q.shape[2]).to(q.dtype).masked_fill(~mask, float("-inf"))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=softmax_scale, enable_gqa=grouped
    )


def _stat_dtype(q):
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _documents(T, S, bias, cu_seqlens) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Rows, keys and bias of each document; the whole of them without cu_seqlens."""
    if cu_seqlens is None:
        yield slice(0, T), slice(0, S), bias
        return
    offsets = cu_seqlens.tolist()
    for start, end in zip(offsets, offsets[1:], strict=False):
        corner = None if bias is None else bias[:, : end - start, : end - start]
        yield slice(start, end), slice(start, end), corner


def _grouped(tensor, H_kv, wide):
    """(B, H, T, D) -> (B, H_kv, H / H_kv * T, D): the query heads of one key/value head as rows of one product."""
    B, H, T, D = tensor.shape
    return tensor.to(wide).reshape(B, H_kv, H // H_kv * T, D)


def _scores(q, k, bias, key_lengths, causal, softmax_scale):
    B, H, T, _ = q.shape
    H_kv, S = k.shape[1], k.shape[2]
    wide = _stat_dtype(q)
    s = (_grouped(q, H_kv, wide) @ k.to(wide).mT).mul_(softmax_scale).view(B, H, T, S)
    if bias is not None:
        s += bias
    if causal or key_lengths is not None:
        s.masked_fill_(~_visible(q, k, causal, None, key_lengths), float("-inf"))
    return s


def _reference_fwd(q, k, v, bias, cu_seqlens, key_lengths, causal, softmax_scale):
    B, H, T, D = q.shape
    H_kv = k.shape[1]
    o, lse = _fake_fwd(q, k, v, bias, cu_seqlens, key_lengths, causal, softmax_scale)
    k, v = _without_padding(k, v, key_lengths)
    for rows, keys, corner in _documents(T, k.shape[2], bias, cu_seqlens):
        s = _scores(q[:, :, rows], k[:, :, keys], corner, key_lengths, causal, softmax_scale)
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


def _reference_bwd(do, q, k, v, o, lse, bias, cu_seqlens, key_lengths, causal, softmax_scale):
    B, H, T, D = q.shape
    H_kv, S = k.shape[1], k.shape[2]
    wide = lse.dtype
    dq, dk, dv, dbias = _fake_bwd(do, q, k, v, o, lse, bias, cu_seqlens, key_lengths, causal, softmax_scale)
    wide_dbias = torch.zeros_like(dbias, dtype=wide)
    k, v = _without_padding(k, v, key_lengths)
    for rows, keys, corner in _documents(T, S, bias, cu_seqlens):
        s = _scores(q[:, :, rows], k[:, :, keys], corner, key_lengths, causal, softmax_scale)
        p = _probabilities(s, lse[:, :, rows])
        do_rows = _grouped(do[:, :, rows], H_kv, wide)
        dv[:, :, keys] = _grouped(p, H_kv, wide).mT @ do_rows
        dp = (do_rows @ v[:, :, keys].to(wide).mT).view_as(p)
        # Kernels take this sum as do . o, which needs no second pass over the keys but carries the rounding of o.
        delta = (p * dp).sum(-1, keepdim=True)  # (B, H, T, 1)
        ds = dp.sub_(delta).mul_(p)
        if bias is not None:
            n, m = ds.shape[2:]
            wide_dbias[:, :n, :m] += ds.sum(0).sum_to_size(bias.shape[0], n, m)
        ds = _grouped(ds.mul_(softmax_scale), H_kv, wide)
        dq[:, :, rows] = (ds @ k[:, :, keys].to(wide)).view(B, H, p.shape[2], D)
        dk[:, :, keys] = ds.mT @ _grouped(q[:, :, rows], H_kv, wide)
    return dq, dk, dv, dbias.copy_(wide_dbias)


def _fake_fwd(q, k, v, bias, cu_seqlens, key_lengths, causal, softmax_scale):
    B, H, T, _ = q.shape
    return _empty_transposed(q), q.new_empty((B, H, T), dtype=_stat_dtype(q))


def _fake_bwd(do, q, k, v, o, lse, bias, cu_seqlens, key_lengths, causal, softmax_scale):
    dbias = q.new_empty(0) if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format)
    return _empty_transposed(q), _empty_transposed(k), _empty_transposed(v), dbias


def _empty_transposed(tensor):
    B, H, T, D = tensor.shape
    return tensor.new_empty((B, T, H, D)).transpose(1, 2)


def _case(B, H, T, D, *, H_kv=None, S=None, causal=False, bias_heads=0, offsets=None, lengths=None, spread=1.0):
    H_kv, S = H_kv or H, T if S is None else S
    longest = S if offsets is None else max(b - a for a, b in zip(offsets, offsets[1:], strict=False))

    def make(generator):
        def draw(*size):
            return torch.randn(size, generator=generator, dtype=torch.float64)

        inputs = {"q": spread * draw(B, H, T, D), "k": draw(B, H_kv, S, D), "v": draw(B, H_kv, S, D), "causal": causal}
        if bias_heads:
            inputs["bias"] = draw(bias_heads, T if offsets is None else longest, longest)
        if offsets is not None:
            inputs["cu_seqlens"] = torch.tensor(offsets, dtype=torch.int32)
        if lengths is not None:
            inputs["key_lengths"] = torch.tensor(lengths)
        return inputs

    return make


def _bad(name, match, error=ValueError, **changed):
    good = {"q": torch.ones(1, 4, 3, 8), "k": torch.ones(1, 2, 3, 8), "v": torch.ones(1, 2, 3, 8)}
    return BadCase(name, lambda: {**good, **changed}, error, match)


def _bench(B, H, T, D, causal):
    pairs = B * H * T * (T + 1) // 2 if causal else B * H * T * T
    return BenchCase(
        f"{B}x{H}x{T}x{D}{'_causal' if causal else ''}",
        _case(B, H, T, D, causal=causal),
        flops=4 * pairs * D,
        backward_flops=10 * pairs * D,  # q k^T again, then dv, dp, dq, dk
        bytes_per_element=4 * B * H * T * D,
        backward_bytes_per_element=8 * B * H * T * D,
    )


_SCHEMAS = {
    "fwd": "(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? cu_seqlens, Tensor? key_lengths, bool causal, "
    "float softmax_scale) -> (Tensor, Tensor)",
    "bwd": "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? bias, Tensor? cu_seqlens, "
    "Tensor? key_lengths, bool causal, float softmax_scale) -> (Tensor, Tensor, Tensor, Tensor)",
}

OP = Op(
    name="attention",
    function=attention,
    reference=attention_reference,
    torch_peer=_torch_peer,
    schemas=_SCHEMAS,
    fakes={"fwd": _fake_fwd, "bwd": _fake_bwd},
    checks={"fwd": _check_values},
    backends={
        "reference": Backend(kernels={"fwd": _reference_fwd, "bwd": _reference_bwd}, devices=("cpu", "cuda")),
        "cpu": Backend(
            kernels={s: _extension.cpu_kernel(f"attention_{s}") for s in _SCHEMAS},
            devices=("cpu",),
            missing=lambda: _extension.why_missing("attention_fwd", "attention_bwd"),
        ),
    },
    cases=(
        Case("tiny", _case(2, 2, 3, 4), gradcheck=True),
        Case("tiny_causal_grouped", _case(1, 4, 3, 4, H_kv=2, S=5, causal=True), gradcheck=True),
        Case("tiny_bias", _case(2, 2, 3, 4, bias_heads=2, causal=True), gradcheck=True),
        Case("tiny_shared_bias", _case(2, 2, 3, 4, S=4, bias_heads=1, lengths=[4, 2]), gradcheck=True),
        Case("tiny_packed", _case(1, 2, 6, 4, offsets=[0, 1, 4, 4, 6], causal=True), gradcheck=True),
        Case("tiny_lengths", _case(3, 2, 3, 4, S=4, lengths=[4, 1, 0]), gradcheck=True),
        Case("one_token", _case(1, 1, 1, 1)),
        Case("decode", _case(3, 4, 1, 64, H_kv=1, S=70, causal=True, lengths=[70, 1, 33])),
        Case("rows_that_see_nothing", _case(1, 2, 37, 16, S=5, causal=True)),
        Case("no_keys", _case(1, 2, 3, 8, S=0)),
        Case("no_queries", _case(2, 2, 0, 8, S=4)),
        Case("no_batch", _case(0, 2, 3, 8)),
        *(
            Case(f"causal_{T}_{D}", _case(1, 2, T, D, causal=True))
            for T, D in ((17, 40), (64, 64), (65, 80), (129, 32), (257, 64), (130, 128))
        ),
        Case("full_100_77", _case(2, 3, 100, 64, S=77)),
        Case("multi_query", _case(2, 6, 70, 32, H_kv=1, causal=True)),
        Case("many_keys", _case(1, 2, 33, 64, S=300, causal=True, lengths=[290])),
        Case("packed", _case(1, 4, 200, 64, H_kv=2, offsets=[0, 1, 1, 65, 200], causal=True)),
        Case("packed_full", _case(1, 2, 150, 32, offsets=[0, 70, 73, 150])),
        Case("packed_bias", _case(1, 2, 150, 32, offsets=[0, 70, 73, 150], causal=True, bias_heads=2)),
        Case("bias", _case(2, 3, 67, 32, S=90, bias_heads=3, causal=True)),
        Case(
            "float32_bias",
            _case(2, 2, 40, 32, bias_heads=2, causal=True),
            dtypes=(torch.bfloat16, torch.float16),
            wide=("bias",),
        ),
        # Scores in the hundreds: exp overflows unless the running maximum is taken out first.
        Case("large_scores", _case(1, 2, 90, 64, causal=True, spread=30.0)),
    ),
    bad_cases=(
        _bad("q_rank", r"q must be \(B, H, T, D\)", q=torch.ones(4, 3, 8)),
        _bad("q_integers", "q must be floating", TypeError, q=torch.ones(1, 4, 3, 8, dtype=torch.int64)),
        _bad("heads", "H_kv dividing H", k=torch.ones(1, 3, 3, 8), v=torch.ones(1, 3, 3, 8)),
        _bad("head_width", "k must be", k=torch.ones(1, 2, 3, 7)),
        _bad("v_shape", "v must be", v=torch.ones(1, 2, 4, 8)),
        _bad("k_dtype", "k must be torch.float32", TypeError, k=torch.ones(1, 2, 3, 8).half()),
        _bad("bias_shape", r"bias must be \(1 or 4, 3, 3\)", bias=torch.ones(2, 3, 3)),
        _bad("bias_dtype", "bias must be torch.float32", TypeError, bias=torch.ones(1, 3, 3).half()),
        _bad("key_lengths_shape", r"key_lengths must be \(1,\)", key_lengths=torch.tensor([1, 2])),
        _bad("key_lengths_dtype", "key_lengths must be torch.int32", TypeError, key_lengths=torch.tensor([1.0])),
        _bad("key_lengths_range", r"key_lengths must be in \[0, S = 3\], got \[4\]", key_lengths=torch.tensor([4])),
        _bad("cu_seqlens_dtype", "cu_seqlens must be torch.int32", TypeError, cu_seqlens=torch.tensor([0, 3])),
        _bad("cu_seqlens_end", "rise from 0 to T = 3", cu_seqlens=torch.tensor([0, 2], dtype=torch.int32)),
        _bad("cu_seqlens_order", "rise from 0 to T = 3", cu_seqlens=torch.tensor([0, 4, 3], dtype=torch.int32)),
        _bad(
            "cu_seqlens_bias",
            "cover the longest document, 2",
            cu_seqlens=torch.tensor([0, 2, 3], dtype=torch.int32),
            bias=torch.ones(1, 1, 1),
        ),
        _bad(
            "cu_seqlens_and_key_lengths",
            "exclude each other",
            cu_seqlens=torch.tensor([0, 3], dtype=torch.int32),
            key_lengths=torch.tensor([3]),
        ),
        _bad(
            "cu_seqlens_cross",
            "as many keys as queries",
            q=torch.ones(1, 4, 2, 8),
            cu_seqlens=torch.tensor([0, 2], dtype=torch.int32),
        ),
    ),
    bench_cases=(_bench(16, 6, 256, 64, causal=True), _bench(1, 12, 1024, 64, causal=True)),
)
