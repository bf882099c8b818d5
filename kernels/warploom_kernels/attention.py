"""Attention, forward and backward: the launchers of the kernels in _attention_fwd.py, _attention_bwd.py and
_attention_bias.py.

Deterministic without atomics: dq is made by who owns queries, dk and dv by who owns keys, and the gradient of a bias by
who owns a piece of the bias; each makes the probabilities again from the log-sum-exp. Launchers take the arguments of
the operators warploom::attention_fwd and _bwd and return what those return.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from warploom_kernels._attention_bias import attention_bwd_dbias_kernel, attention_bwd_ddistance_kernel
from warploom_kernels._attention_bwd import attention_bwd_dkdv_kernel, attention_bwd_dq_kernel
from warploom_kernels._attention_fwd import attention_fwd_kernel
from warploom_kernels._attention_tiles import tile_configs
from warploom_kernels._launch import INTERPRETER, Config, architecture, launch, power_of_2_key


def _strides(names: str, tensor: Tensor) -> dict[str, int]:
    """stride_<letter>b, h and t of a (B, H, T, D) tensor."""
    return {f"stride_{names}{axis}": tensor.stride(i) for i, axis in enumerate("bht")}


def _dense_rows(tensor: Tensor) -> Tensor:
    """With dense columns, and a stride of its own for each row, which expanded gradients lack."""
    T, D = tensor.shape[-2:]
    return tensor if (tensor.stride(-1) == 1 or D == 1) and (tensor.stride(-2) >= D or T == 1) else tensor.contiguous()


def _common(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None,
    key_lengths: Tensor | None, causal: bool, window: int | None, softmax_scale: float,
) -> dict[str, object]:  # fmt: skip
    H, T, D = q.shape[1:]
    bias = None if bias is None else bias.contiguous()
    stride_bh, stride_bt, stride_bs, bias_zero = 0, 0, 0, 0
    if bias is not None:
        stride_bh = 0 if bias.shape[0] == 1 else bias.stride(0)
        stride_bt, stride_bs = (-1, 1) if bias.dim() == 2 else (bias.shape[2], 1)
        if bias.dim() == 2:
            bias_zero = T - 1 if cu_seqlens is None else bias.shape[1] // 2
    num_documents = 1 if cu_seqlens is None else cu_seqlens.numel() - 1
    ends = None if cu_seqlens is None else cu_seqlens.contiguous()
    return {
        "q": q,
        "k": k,
        "v": v,
        "bias": bias,
        "cu_seqlens": ends,
        "cu_seqlens_k": ends if cu_seqlens_k is None else cu_seqlens_k.contiguous(),
        "key_lengths": None if key_lengths is None else key_lengths.contiguous(),
        **_strides("q", q),
        **_strides("k", k),
        **_strides("v", v),
        "stride_bh": stride_bh,
        "stride_bt": stride_bt,
        "stride_bs": stride_bs,
        "bias_zero": bias_zero,
        "H": H,
        "T_all": T,
        "S_all": k.shape[2],
        "num_documents": num_documents,
        "window": window,
        "scale": softmax_scale,
        "GROUP": H // k.shape[1],
        "D": D,
        "CAUSAL": causal,
        "DOCUMENTS": triton.next_power_of_2(num_documents),
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
    }


def _num_tiles(length: int, block: int, cu_seqlens: Tensor | None) -> int:
    """At least as many as all documents have, whatever their lengths, which only the device knows."""
    return triton.cdiv(length, block) + (0 if cu_seqlens is None else cu_seqlens.numel() - 1)


def _tma_fits(arch: int, *tensors: Tensor) -> bool:
    """The copy engine wants rows that begin at multiples of 16 bytes, and blocks of at least 16."""
    return 90 <= arch and all(
        tensor.data_ptr() % 16 == 0
        and tensor.shape[-1] * tensor.element_size() >= 16
        and all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1])
        for tensor in tensors
    )


def _key(q: Tensor, k: Tensor, common: dict[str, object]) -> str:
    B, H, T, D = q.shape
    masks = "causal" if common["CAUSAL"] else "full"
    masks += "" if common["window"] is None else " window"
    masks += "" if common["bias"] is None else " bias"
    return f"{q.dtype} {masks} {power_of_2_key(B * H, T, k.shape[2])}x{D} group {common['GROUP']}"


def _empty_transposed(tensor: Tensor) -> Tensor:
    B, H, T, D = tensor.shape
    return tensor.new_empty((B, T, H, D)).transpose(1, 2)


def launch_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None,
    key_lengths: Tensor | None, causal: bool, window: int | None, softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, H, T, D = q.shape
    o = _empty_transposed(q)
    lse = q.new_empty((B, H, T), dtype=torch.float32)
    if q.numel():
        q, k, v = (_dense_rows(tensor) for tensor in (q, k, v))
        common = _common(q, k, v, bias, cu_seqlens, cu_seqlens_k, key_lengths, causal, window, softmax_scale)
        arch = architecture(q.device)
        launch(
            attention_fwd_kernel,
            lambda constants: (B * H, _num_tiles(T, constants["BLOCK_T"], cu_seqlens)),
            {**common, "o": o, "lse": lse, **_strides("o", o)},
            tile_configs("fwd", arch, q, common, _tma_fits(arch, q, k, v)),
            _key(q, k, common),
        )
    return o, lse


def launch_attention_bwd(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, bias: Tensor | None,
    cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, key_lengths: Tensor | None,
    causal: bool, window: int | None, softmax_scale: float, need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, H, T, D = q.shape
    H_kv, S = k.shape[1], k.shape[2]
    dq, dk, dv = _empty_transposed(q), _empty_transposed(k), _empty_transposed(v)
    do, q, k, v = (_dense_rows(tensor) for tensor in (do, q, k, v))
    o = o if o.stride() == dq.stride() else _empty_transposed(q).copy_(o)
    common = _common(q, k, v, bias, cu_seqlens, cu_seqlens_k, key_lengths, causal, window, softmax_scale)
    arch, key = architecture(q.device), _key(q, k, common)
    lse = lse.contiguous()
    rows = {"do": do, **_strides("g", do), "lse": lse, "delta": torch.empty_like(lse)}
    if q.numel():
        launch(
            attention_bwd_dq_kernel,
            lambda constants: (B * H, _num_tiles(T, constants["BLOCK_T"], cu_seqlens)),
            {**common, **rows, "o": o, "dq": dq, **_strides("o", dq)},
            tile_configs("dq", arch, q, common, _tma_fits(arch, k, v)),
            key,
        )
    if k.numel():
        launch(
            attention_bwd_dkdv_kernel,
            lambda constants: (B * H_kv, _num_tiles(S, constants["BLOCK_S"], cu_seqlens)),
            {**common, **rows, "dk": dk, "dv": dv, **_strides("d", dk)},
            tile_configs("dkdv", arch, q, common, _tma_fits(arch, do, q)),
            key,
        )
    dbias = q.new_empty(0)
    if need_dbias:
        assert bias is not None
        dbias = _bias_gradient(bias, {**common, **rows}, B, T, S, cu_seqlens, arch)
    return dq, dk, dv, dbias


def _bias_gradient(
    bias: Tensor, arguments: dict[str, object], B: int, T: int, S: int, cu_seqlens: Tensor | None, arch: int
) -> Tensor:
    heads = bias.shape[0]
    arguments = {name: value for name, value in arguments.items() if name != "DOCUMENTS"}
    arguments["num_heads"] = arguments["H"] if heads == 1 else 1
    arguments["num_entries"] = B if cu_seqlens is None else arguments["num_documents"]
    width = int(arguments["BLOCK_D"])  # type: ignore[call-overload]
    q = arguments["q"]
    assert isinstance(q, Tensor)
    block = 64 if 90 <= arch < 120 and q.dtype != torch.float32 else 32  # without tensor cores those of 64 spill
    depth = {"DEPTH": min(width, 16 if arch == INTERPRETER else 64)}
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format)
    if bias.dim() == 3:
        n, m = bias.shape[1:]
        if bias.numel():
            launch(
                attention_bwd_dbias_kernel,
                lambda _: (triton.cdiv(n, block), triton.cdiv(m, block), heads),
                {**arguments, "dbias": dbias, "n": n, "m": m},
                [Config({"BLOCK_T": block, "BLOCK_S": block, **depth}, num_warps=8)],
            )
        return dbias
    num_tiles = triton.cdiv(T, block)
    diagonals = num_tiles + triton.cdiv(S, block) - 1
    if not T or not S:
        return dbias.zero_()
    sums = bias.new_empty((heads, diagonals, 2, block), dtype=torch.float32)
    launch(
        attention_bwd_ddistance_kernel,
        lambda _: (diagonals, heads),
        {**arguments, "sums": sums, "first_diagonal": 1 - num_tiles, "num_tiles": num_tiles},
        [Config({"BLOCK": block, **depth}, num_warps=8)],
    )
    # Distances from -num_tiles * block on: those above a diagonal of tiles are those below the next.
    by_distance = sums.new_zeros(heads, diagonals + 1, block)
    by_distance[:, 1:] += sums[:, :, 0]
    by_distance[:, :-1] += sums[:, :, 1]
    zero = num_tiles * block  # where distance 0 is
    first = zero - int(arguments["bias_zero"])  # type: ignore[call-overload]
    flat, width = by_distance.flatten(1), bias.shape[1]
    lo, hi = max(first, 0), min(first + width, flat.shape[1])
    dbias.zero_()
    dbias[:, lo - first : hi - first] = flat[:, lo:hi]
    return dbias
