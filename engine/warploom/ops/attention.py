"""o = softmax(softmax_scale * q k^T + bias) v per head, over the keys a query sees (Vaswani et al., 2017).

Online softmax over key blocks, with log-sum-exp saved for the backward pass: Dao et al., 2022. Grouped key/value heads:
Ainslie et al., 2023. Every tensor shaped like q, k or v that an operator returns is laid out so that its
transpose(1, 2) is contiguous: the (B, T, H, D) that the projections around attention read and write.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from warploom.ops import _extension, _triton
from warploom.ops._attention_cases import BAD_CASES, BENCH_CASES, CASES
from warploom.ops._attention_reference import (
    attention_reference,
    fake_bwd,
    fake_fwd,
    reference_bwd,
    reference_fwd,
    torch_peer,
)
from warploom.ops._op import Backend, Op


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


def _triton_refuses(q, softmax_scale):
    if q.shape[-1] > 256:
        return f"its heads are at most 256 wide, got {q.shape[-1]}"
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
    torch_peer=torch_peer,
    schemas=_SCHEMAS,
    fakes={"fwd": fake_fwd, "bwd": fake_bwd},
    checks={"fwd": _check_values},
    backends={
        "reference": Backend(kernels={"fwd": reference_fwd, "bwd": reference_bwd}, devices=("cpu", "cuda")),
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
    cases=CASES,
    bad_cases=BAD_CASES,
    bench_cases=BENCH_CASES,
)
