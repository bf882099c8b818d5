"""o = softmax(softmax_scale * q k^T + bias) v per head, over the keys a query sees (Vaswani et al., 2017).

Online softmax over key blocks, with log-sum-exp saved for the backward pass: Dao et al., 2022. Grouped key/value heads:
Ainslie et al., 2023. Every tensor shaped like q, k or v that an operator returns is laid out so that its
transpose(1, 2) is contiguous: the (B, T, H, D) that the projections around attention read and write.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from warploom.ops import _extension, _triton
from warploom.ops._op import Backend, BadCase, BenchCase, Case, Op


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    key_lengths: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """Return softmax(softmax_scale * q k^T + bias) v, (B, H, T, D) in q's dtype.

    q: (B, H, T, D); k, v: (B, H_kv, S, D), where H_kv divides H: query head h reads key/value head h // (H // H_kv).
    One floating dtype; softmax runs in float32 (float64 for float64). softmax_scale: 1 / sqrt(D) if None.
    causal: query i sees the keys j <= i + (S - T), so that the last query sees every key.
    window: it sees those with |i + (S - T) - j| < window, so that with causal it sees the last `window` of its keys.
    bias: of q's dtype or float32, added after the scaling; it gets a gradient. (1 or H, T, S), or a number for each
    distance, (1 or H, T + S - 1): entry T - 1 + j - i is for query i and key j.
    key_lengths: (B,) int32 or int64 in [0, S]; the keys from key_lengths[b] on are not seen, whatever they hold.
    cu_seqlens: (number of documents + 1,) int32, the offsets of the documents packed into one row, from 0 to T; needs
    B == 1. Documents do not see each other. cu_seqlens_k: those of their keys, from 0 to S; as cu_seqlens if None.
    T, S, i and j above are then those of the document. Each takes the top-left corner of bias, which is (1 or H, n, m)
    with n and m at least its longest, or has distance 0 in the middle: (1 or H, 2n - 1).
    A query that sees no key gets zeros and gives no gradient.
    Raises ValueError for a wrong shape or value (values of tensors are read on the CPU only), TypeError for a wrong
    dtype.
    """
    _check_shapes(q, k, v, bias, cu_seqlens, cu_seqlens_k, key_lengths)
    if window is not None and not isinstance(window, int):
        raise TypeError(f"window must be an int or None, got {window!r}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 or None, got {window}")
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return _Attention.apply(q, k, v, bias, cu_seqlens, cu_seqlens_k, key_lengths, causal, window, scale)


def _check_shapes(q, k, v, bias, cu_seqlens, cu_seqlens_k, key_lengths):
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
    documents = {"cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k}
    for name, tensor in {"k": k, "v": v, "bias": bias, **documents, "key_lengths": key_lengths}.items():
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{name} must be on {q.device} as q is, got {tensor.device}")
    for name, tensor in documents.items():
        if tensor is None:
            continue
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} must be torch.int32, got {tensor.dtype}")
        if tensor.dim() != 1 or tensor.shape[0] < 2:
            raise ValueError(f"{name} must be (documents + 1,), got {tuple(tensor.shape)}")
    if cu_seqlens is None and cu_seqlens_k is not None:
        raise ValueError("cu_seqlens_k needs cu_seqlens, got None")
    if cu_seqlens is not None:
        if key_lengths is not None:
            raise ValueError("cu_seqlens and key_lengths exclude each other, got both")
        if B != 1:
            raise ValueError(f"cu_seqlens needs B == 1, got q {tuple(q.shape)}")
        if cu_seqlens_k is None and T != S:
            raise ValueError(
                f"cu_seqlens_k must say where documents begin among keys that are not as many as queries: got None "
                f"with q {tuple(q.shape)}, k {tuple(k.shape)}"
            )
        if cu_seqlens_k is not None and cu_seqlens_k.shape != cu_seqlens.shape:
            raise ValueError(
                f"cu_seqlens_k must be {tuple(cu_seqlens.shape)} as cu_seqlens is, got {tuple(cu_seqlens_k.shape)}"
            )
    if key_lengths is not None:
        if key_lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"key_lengths must be torch.int32 or torch.int64, got {key_lengths.dtype}")
        if key_lengths.shape != (B,):
            raise ValueError(f"key_lengths must be ({B},) to match q {tuple(q.shape)}, got {tuple(key_lengths.shape)}")
    if bias is not None:
        if bias.dtype not in (q.dtype, torch.float32):
            raise TypeError(f"bias must be {q.dtype} as q is or torch.float32, got {bias.dtype}")
        if bias.dim() not in (2, 3) or bias.shape[0] not in (1, H):
            fits = False
        elif cu_seqlens is not None:
            fits = bias.dim() == 3 or bias.shape[1] % 2 == 1
        else:
            fits = bias.shape[1:] == ((T, S) if bias.dim() == 3 else (max(0, T + S - 1),))
        if not fits:
            form = "n, m) or (1 or {}, 2n - 1" if cu_seqlens is not None else f"{T}, {S}) or (1 or {{}}, {T + S - 1}"
            raise ValueError(f"bias must be (1 or {H}, {form.format(H)}), got {tuple(bias.shape)}")


def _check_values(q, k, v, bias, cu_seqlens, cu_seqlens_k, key_lengths, *options):
    """The back ends trust these as memory offsets."""
    T, S = q.shape[2], k.shape[2]
    if cu_seqlens is not None:
        queries = _offsets("cu_seqlens", cu_seqlens, "T", T)
        keys = queries if cu_seqlens_k is None else _offsets("cu_seqlens_k", cu_seqlens_k, "S", S)
        n, m = (max(b - a for a, b in zip(ends, ends[1:], strict=False)) for ends in (queries, keys))
        if bias is not None and (bias.shape[1] < 2 * max(n, m) - 1 if bias.dim() == 2 else bias.shape[1:] < (n, m)):
            raise ValueError(f"bias must cover the longest document, {n} x {m} tokens, got shape {tuple(bias.shape)}")
    if key_lengths is not None and any(not 0 <= length <= S for length in key_lengths.tolist()):
        raise ValueError(f"key_lengths must be in [0, S = {S}], got {key_lengths.tolist()}")


def _offsets(name, tensor, end_name, end):
    offsets = tensor.tolist()
    if offsets[0] != 0 or offsets[-1] != end or any(a > b for a, b in zip(offsets, offsets[1:], strict=False)):
        raise ValueError(f"{name} must rise from 0 to {end_name} = {end}, got {offsets}")
    return offsets


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, cu_seqlens, cu_seqlens_k, key_lengths, causal, window, softmax_scale):
        options = causal, window, softmax_scale
        o, lse = torch.ops.warploom.attention_fwd.default(
            q, k, v, bias, cu_seqlens, cu_seqlens_k, key_lengths, *options
        )
        ctx.save_for_backward(q, k, v, o, lse, bias, cu_seqlens, cu_seqlens_k, key_lengths)
        ctx.options = options
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        # A bias without a gradient (ALiBi's) costs no sums over the batch.
        need_dbias = ctx.needs_input_grad[3]
        dq, dk, dv, dbias = torch.ops.warploom.attention_bwd.default(do, *ctx.saved_tensors, *ctx.options, need_dbias)
        return dq, dk, dv, dbias if need_dbias else None, None, None, None, None, None, None


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
    visible, rows, keys = _layout(q, k, causal, window, cu_seqlens, cu_seqlens_k, key_lengths)
    k, v = (tensor.to(wide).repeat_interleave(group, 1) for tensor in (k, v))  # (B, H, S, D)
    s = scale * (q.to(wide) @ k.mT)  # (B, H, T, S)
    if bias is not None:
        s = s + _placed_bias(bias, rows, keys, cu_seqlens, q.shape[2]).to(wide)
    # Masked twice: a row that sees nothing is NaN after the softmax, in its gradient too.
    p = s.masked_fill(~visible, float("-inf")).softmax(-1).masked_fill(~visible, 0.0)
    return (p @ v).to(q.dtype)


def _layout(q, k, causal, window, cu_seqlens, cu_seqlens_k, key_lengths):
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


def _torch_peer(
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
        mask, rows, keys = _layout(q, k, causal, window, cu_seqlens, cu_seqlens_k, key_lengths)
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
        s.masked_fill_(~_layout(q, k, causal, window, None, None, key_lengths)[0], float("-inf"))
    return s


def _reference_fwd(q, k, v, bias, cu_seqlens, cu_seqlens_k, key_lengths, *options):
    B, H, T, D = q.shape
    H_kv = k.shape[1]
    o, lse = _fake_fwd(q, k, v, bias, cu_seqlens, cu_seqlens_k, key_lengths, *options)
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


def _reference_bwd(do, q, k, v, o, lse, bias, cu_seqlens, cu_seqlens_k, key_lengths, *options_and_need):
    *options, need_dbias = options_and_need
    softmax_scale = options[-1]
    B, H, T, D = q.shape
    H_kv, S = k.shape[1], k.shape[2]
    wide = lse.dtype
    dq, dk, dv, dbias = _fake_bwd(do, q, k, v, o, lse, bias, cu_seqlens, cu_seqlens_k, key_lengths, *options_and_need)
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


def _fake_fwd(q, *others):
    return _empty_transposed(q), q.new_empty(q.shape[:3], dtype=_stat_dtype(q))


def _fake_bwd(do, q, k, v, o, lse, bias, *others):
    need_dbias = others[-1]
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format) if need_dbias else q.new_empty(0)
    return _empty_transposed(q), _empty_transposed(k), _empty_transposed(v), dbias


def _empty_transposed(tensor):
    B, H, T, D = tensor.shape
    return tensor.new_empty((B, T, H, D)).transpose(1, 2)


def _triton_refuses(q, softmax_scale):
    if q.shape[-1] > 256:
        return f"its heads are at most 256 wide, got {q.shape[-1]}"
    # Without tensor cores the operands of a product lie in registers: for wider heads the kernel of dq spills 208 bytes
    # a thread with the smallest tiles there are, 16 x 16 (compiled for sm_80).
    if q.dtype == torch.float32 and q.device.type == "cuda" and q.shape[-1] > 128:
        return f"its heads are at most 128 wide in float32, got {q.shape[-1]}"
    if softmax_scale <= 0:  # the maximum is taken before the scaling
        return f"its softmax_scale must be positive, got {softmax_scale}"
    return _triton.refuses_product(q)


def _triton_refuses_bwd(do, q, k, v, o, lse, bias, *others):
    return _triton_refuses(q, others[-2])


_CUDA_WIDTHS = (64, 96, 128, 256)


def _cuda_refuses(q, k, v, bias, cu_seqlens, cu_seqlens_k, key_lengths, causal, window, softmax_scale):
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it multiplies bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] not in _CUDA_WIDTHS:
        return f"its heads are {', '.join(map(str, _CUDA_WIDTHS))} wide, got {q.shape[-1]}"
    options = {"bias": bias, "cu_seqlens": cu_seqlens, "key_lengths": key_lengths, "window": window}
    for name, option in options.items():
        if option is not None:
            return f"it takes no {name}"
    if q.shape[0] * q.shape[1] > 65535:
        return f"its B * H is at most 65535, got {q.shape[0] * q.shape[1]}"
    return None if softmax_scale > 0 else f"its softmax_scale must be positive, got {softmax_scale}"


def _cuda_refuses_bwd(do, q, k, v, o, lse, *masks_and_need):
    return _cuda_refuses(q, k, v, *masks_and_need[:-1])


_cuda_kernel_fwd, _cuda_kernel_bwd = (_extension.cuda_kernel(f"attention_{suffix}") for suffix in ("fwd", "bwd"))


def _cuda_fwd(q, k, v, bias, cu_seqlens, cu_seqlens_k, key_lengths, causal, window, softmax_scale):
    return _cuda_kernel_fwd(q, k, v, causal, softmax_scale)


def _cuda_bwd(do, q, k, v, o, lse, bias, cu, cu_k, key_lengths, causal, window, softmax_scale, need_dbias):
    return *_cuda_kernel_bwd(do, q, k, v, o, lse, causal, softmax_scale), q.new_empty(0)


def _case(
    B,
    H,
    T,
    D,
    *,
    H_kv=None,
    S=None,
    causal=False,
    window=None,
    bias_heads=0,
    distances=False,
    offsets=None,
    offsets_k=None,
    lengths=None,
    spread=1.0,
):
    """distances: the bias has a number for each, and not for each query and key."""
    H_kv, S = H_kv or H, T if S is None else S
    n, m = (
        end if ends is None else max(b - a for a, b in zip(ends, ends[1:], strict=False))
        for ends, end in ((offsets, T), (offsets_k or offsets, S))
    )

    def make(generator):
        def draw(*size):
            return torch.randn(size, generator=generator, dtype=torch.float64)

        inputs = {"q": spread * draw(B, H, T, D), "k": draw(B, H_kv, S, D), "v": draw(B, H_kv, S, D), "causal": causal}
        if window is not None:
            inputs["window"] = window
        if bias_heads and distances:
            inputs["bias"] = draw(bias_heads, T + S - 1 if offsets is None else 2 * max(n, m) - 1)
        elif bias_heads:
            inputs["bias"] = draw(bias_heads, n, m)
        for name, ends in (("cu_seqlens", offsets), ("cu_seqlens_k", offsets_k)):
            if ends is not None:
                inputs[name] = torch.tensor(ends, dtype=torch.int32)
        if lengths is not None:
            inputs["key_lengths"] = torch.tensor(lengths)
        return inputs

    return make


def _bad(name, match, error=ValueError, **changed):
    good = {"q": torch.ones(1, 4, 3, 8), "k": torch.ones(1, 2, 3, 8), "v": torch.ones(1, 2, 3, 8)}
    return BadCase(name, lambda: {**good, **changed}, error, match)


def _offsets_tensor(*offsets):
    return torch.tensor(offsets, dtype=torch.int32)


def _bench(B, H, T, D, *, name="", pairs=None, **options):
    """pairs: of a query and a key that it sees, in one head; half of all and the diagonal if None, as in causal."""
    pairs = B * H * (T * (T + 1) // 2 if pairs is None else pairs)
    elements = B * T * D * (H + options.get("H_kv", H))
    return BenchCase(
        f"{B}x{H}x{T}x{D}_causal{name}",
        _case(B, H, T, D, causal=True, **options),
        flops=4 * pairs * D,
        backward_flops=10 * pairs * D,  # q k^T again, then dv, dp, dq, dk
        bytes_per_element=2 * elements,
        backward_bytes_per_element=4 * elements,
    )


_RAGGED = (0, 40, 640, 1000, 1900, 2048)


_OPERANDS = "Tensor q, Tensor k, Tensor v"
_MASKS = (
    "Tensor? bias, Tensor? cu_seqlens, Tensor? cu_seqlens_k, Tensor? key_lengths, bool causal, int? window, "
    "float softmax_scale"
)
_SCHEMAS = {
    "fwd": f"({_OPERANDS}, {_MASKS}) -> (Tensor, Tensor)",
    "bwd": f"(Tensor do, {_OPERANDS}, Tensor o, Tensor lse, {_MASKS}, bool need_dbias) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
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
        "triton": Backend(
            kernels={s: _triton.launcher("attention", f"launch_attention_{s}") for s in _SCHEMAS},
            devices=("cuda", "cpu"),
            missing=_triton.missing,
            refuses={
                "fwd": lambda q, *others: _triton_refuses(q, others[-1]),
                "bwd": _triton_refuses_bwd,
            },
        ),
        "cuda": Backend(
            kernels={"fwd": _cuda_fwd, "bwd": _cuda_bwd},
            devices=("cuda",),
            missing=lambda: _extension.why_cuda_missing("attention_fwd", "attention_bwd"),
            refuses={"fwd": _cuda_refuses, "bwd": _cuda_refuses_bwd},
        ),
    },
    cases=(
        Case("tiny", _case(2, 2, 3, 4), gradcheck=True),
        Case("tiny_causal_grouped", _case(1, 4, 3, 4, H_kv=2, S=5, causal=True), gradcheck=True),
        Case("tiny_bias", _case(2, 2, 3, 4, bias_heads=2, causal=True), gradcheck=True),
        Case("tiny_shared_bias", _case(2, 2, 3, 4, S=4, bias_heads=1, lengths=[4, 2]), gradcheck=True),
        Case("tiny_packed", _case(1, 2, 6, 4, offsets=[0, 1, 4, 4, 6], causal=True), gradcheck=True),
        Case("tiny_lengths", _case(3, 2, 3, 4, S=4, lengths=[4, 1, 0]), gradcheck=True),
        Case("tiny_window", _case(1, 2, 6, 4, causal=True, window=3), gradcheck=True),
        Case("tiny_window_both_ways", _case(1, 2, 4, 4, S=6, window=2, bias_heads=1), gradcheck=True),
        Case("tiny_distances", _case(2, 4, 3, 4, H_kv=2, S=5, bias_heads=4, distances=True), gradcheck=True),
        Case(
            "tiny_packed_cross",
            _case(
                *(1, 2, 5, 4),
                S=7,
                offsets=[0, 2, 2, 5],
                offsets_k=[0, 3, 4, 7],
                bias_heads=1,
                distances=True,
                causal=True,
            ),
            gradcheck=True,
        ),
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
        Case("wide_96", _case(1, 2, 40, 96, H_kv=1, S=70, causal=True)),
        Case("wide_256", _case(1, 1, 70, 256, causal=True)),
        Case("nothing_seen_64", _case(1, 2, 37, 64, S=5, causal=True)),
        Case("full_100_77", _case(2, 3, 100, 64, S=77)),
        Case("multi_query", _case(2, 6, 70, 32, H_kv=1, causal=True)),
        Case("many_keys", _case(1, 2, 33, 64, S=300, causal=True, lengths=[290])),
        Case("packed", _case(1, 4, 200, 64, H_kv=2, offsets=[0, 1, 1, 65, 200], causal=True)),
        Case("packed_full", _case(1, 2, 150, 32, offsets=[0, 70, 73, 150])),
        Case("packed_bias", _case(1, 2, 150, 32, offsets=[0, 70, 73, 150], causal=True, bias_heads=2)),
        Case("bias", _case(2, 3, 67, 32, S=90, bias_heads=3, causal=True)),
        *(
            Case(f"window_{T}_{window}", _case(1, 4, T, 32, H_kv=2, S=S, causal=causal, window=window, lengths=lengths))
            for T, S, window, causal, lengths in (
                (257, 257, 1, True, None),
                (257, 300, 50, True, [280]),
                (200, 200, 64, False, None),
                (150, 300, 17, False, [200]),
                (70, 70, 1000, True, None),
            )
        ),
        Case("packed_window", _case(1, 2, 200, 32, offsets=[0, 130, 131, 200], causal=True, window=20)),
        Case(
            "packed_cross",
            _case(
                1, 4, 150, 64, H_kv=2, S=220, offsets=[0, 70, 70, 73, 150], offsets_k=[0, 3, 40, 140, 220], causal=True
            ),
        ),
        Case(
            "packed_cross_bias",
            _case(1, 2, 90, 32, S=120, offsets=[0, 20, 90], offsets_k=[0, 70, 120], bias_heads=2, window=40),
        ),
        Case("distances", _case(2, 3, 130, 32, S=90, bias_heads=3, distances=True)),
        Case("shared_distances", _case(2, 4, 97, 40, H_kv=2, causal=True, window=70, bias_heads=1, distances=True)),
        Case(
            "packed_distances",
            _case(1, 2, 150, 32, offsets=[0, 70, 73, 150], causal=True, bias_heads=2, distances=True),
        ),
        Case("bias_without_gradient", _case(2, 2, 67, 32, bias_heads=2, causal=True), no_grad=("bias",)),
        Case(
            "distances_without_gradient",
            _case(1, 4, 1, 64, S=90, bias_heads=4, distances=True, lengths=[77]),
            no_grad=("bias",),
        ),
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
        _bad("bias_shape", r"bias must be \(1 or 4, 3, 3\) or \(1 or 4, 5\)", bias=torch.ones(2, 3, 3)),
        _bad("bias_distances", r"bias must be \(1 or 4, 3, 3\) or \(1 or 4, 5\)", bias=torch.ones(4, 4)),
        _bad("bias_rank", "bias must be", bias=torch.ones(1, 4, 3, 3)),
        _bad("bias_dtype", "bias must be torch.float32", TypeError, bias=torch.ones(1, 3, 3).half()),
        _bad("window_zero", "window must be at least 1 or None, got 0", window=0),
        _bad("window_negative", "window must be at least 1 or None, got -3", causal=True, window=-3),
        _bad("window_fraction", "window must be an int or None, got 2.5", TypeError, window=2.5),
        _bad("key_lengths_shape", r"key_lengths must be \(1,\)", key_lengths=torch.tensor([1, 2])),
        _bad("key_lengths_dtype", "key_lengths must be torch.int32", TypeError, key_lengths=torch.tensor([1.0])),
        _bad("key_lengths_range", r"key_lengths must be in \[0, S = 3\], got \[4\]", key_lengths=torch.tensor([4])),
        _bad("cu_seqlens_dtype", "cu_seqlens must be torch.int32", TypeError, cu_seqlens=torch.tensor([0, 3])),
        _bad("cu_seqlens_shape", r"cu_seqlens must be \(documents \+ 1,\)", cu_seqlens=_offsets_tensor(3)),
        _bad("cu_seqlens_end", "rise from 0 to T = 3", cu_seqlens=_offsets_tensor(0, 2)),
        _bad("cu_seqlens_order", "rise from 0 to T = 3", cu_seqlens=_offsets_tensor(0, 4, 3)),
        _bad(
            "cu_seqlens_bias",
            "cover the longest document, 2",
            cu_seqlens=_offsets_tensor(0, 2, 3),
            bias=torch.ones(1, 1, 1),
        ),
        _bad(
            "cu_seqlens_distances",
            "cover the longest document, 2",
            cu_seqlens=_offsets_tensor(0, 2, 3),
            bias=torch.ones(1, 1),
        ),
        _bad(
            "cu_seqlens_even_distances",
            r"\(1 or 4, 2n - 1\), got \(1, 4\)",
            cu_seqlens=_offsets_tensor(0, 2, 3),
            bias=torch.ones(1, 4),
        ),
        _bad(
            "cu_seqlens_and_key_lengths",
            "exclude each other",
            cu_seqlens=_offsets_tensor(0, 3),
            key_lengths=torch.tensor([3]),
        ),
        _bad(
            "cu_seqlens_cross",
            "cu_seqlens_k must say where",
            q=torch.ones(1, 4, 2, 8),
            cu_seqlens=_offsets_tensor(0, 2),
        ),
        _bad("cu_seqlens_k_alone", "cu_seqlens_k needs cu_seqlens", cu_seqlens_k=_offsets_tensor(0, 3)),
        _bad(
            "cu_seqlens_k_documents",
            r"cu_seqlens_k must be \(2,\) as cu_seqlens is",
            cu_seqlens=_offsets_tensor(0, 3),
            cu_seqlens_k=_offsets_tensor(0, 1, 3),
        ),
        _bad(
            "cu_seqlens_k_end",
            "cu_seqlens_k must rise from 0 to S = 3",
            cu_seqlens=_offsets_tensor(0, 3),
            cu_seqlens_k=_offsets_tensor(0, 4),
        ),
        _bad(
            "cu_seqlens_k_dtype",
            "cu_seqlens_k must be torch.int32",
            TypeError,
            cu_seqlens=_offsets_tensor(0, 3),
            cu_seqlens_k=torch.tensor([0, 3]),
        ),
    ),
    bench_cases=(
        _bench(16, 6, 256, 64),
        _bench(1, 12, 1024, 64),
        _bench(4, 12, 1024, 64),
        _bench(1, 12, 2048, 64),
        _bench(1, 16, 2048, 128),
        _bench(1, 32, 1024, 64, H_kv=8, name="_gqa"),
        _bench(
            *(1, 12, 2048, 64),
            name="_ragged",
            offsets=_RAGGED,
            pairs=sum((b - a) * (b - a + 1) // 2 for a, b in zip(_RAGGED, _RAGGED[1:], strict=False)),
        ),
    ),
)
