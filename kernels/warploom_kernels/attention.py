"""Attention, forward and backward: kernels written with the concepts of _attention_parts.py, launchers below.

Deterministic without atomics: dq is made by who owns queries, dk and dv by who owns keys, and the gradient of a bias by
who owns a piece of the bias; each makes the probabilities again from the log-sum-exp. Launchers take the arguments of
the operators warploom::attention_fwd and _bwd and return what those return. The file is long because each kernel takes
and prepares the same many arguments one by one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from warploom_kernels._attention_parts import (
    LN_2,
    block_range,
    distances,
    document_bounds,
    dot,
    heaviest_first,
    load_rows,
    lse_in_log2,
    online_softmax,
    place_of_tile,
    rows_of,
    store_rows,
    visible,
    with_bias,
)
from warploom_kernels._launch import INTERPRETER, Config, architecture, launch, power_of_2_key

# The arguments that every kernel has: tensors and their strides over batch, heads and rows; columns are dense. lse and
# delta are (B, H, T), dense. bias is read at bias + head * stride_bh + query * stride_bt + key * stride_bs: for a bias
# by distance stride_bt is -1, and the pointer is moved to distance 0 by bias_zero.
#
#   cu_seqlens, cu_seqlens_k  (num_documents + 1,) int32, both or none
#   key_lengths               (B,) or None
#   window                    int or None
#   GROUP                     query heads of one key/value head


@triton.jit
def _attend(
    lo, hi, q_tile, k_rows, v_rows, bias, m, total, acc,
    t0, T, S, seen_keys, least, most, scale, stride_kt, stride_vt, stride_bt, stride_bs,
    D: tl.constexpr, BELOW: tl.constexpr, ABOVE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    queries = t0 + tl.arange(0, BLOCK_T)[:, None]
    for s0 in tl.range(lo, hi, BLOCK_S):
        s0 = tl.multiple_of(s0, BLOCK_S)
        keys = s0 + tl.arange(0, BLOCK_S)[None, :]
        k_tile = load_rows(k_rows, s0, seen_keys, stride_kt, D, BLOCK_S, BLOCK_D, TMA, MASKED)
        s = dot(q_tile, tl.trans(k_tile), tl.zeros((BLOCK_T, BLOCK_S), dtype=tl.float32))
        s, unit = with_bias(s, scale, bias, queries, keys, stride_bt, stride_bs, T, S)
        if MASKED:
            s = tl.where(visible(queries, keys, least, most, seen_keys, BELOW, ABOVE), s, float("-inf"))
        p, m, total, acc = online_softmax(s, unit, m, total, acc)
        v_tile = load_rows(v_rows, s0, seen_keys, stride_vt, D, BLOCK_S, BLOCK_D, TMA, MASKED)
        acc = dot(p.to(v_tile.dtype), v_tile, acc)
    return m, total, acc


@triton.jit
def attention_fwd_kernel(
    q, k, v, o, lse, bias, cu_seqlens, cu_seqlens_k, key_lengths,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_bh, stride_bt, stride_bs, bias_zero,
    H, T_all, S_all, num_documents, window, scale,
    GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    BELOW: tl.constexpr = window is not None
    ABOVE: tl.constexpr = CAUSAL or window is not None
    b, h = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    tile = heaviest_first(tl.program_id(1), tl.num_programs(1), CAUSAL)
    t0, start_q, start_k, T, S = place_of_tile(
        tile, cu_seqlens, cu_seqlens_k, T_all, S_all, num_documents, DOCUMENTS, BLOCK_T, False
    )
    if t0 < T:
        seen_keys = S if key_lengths is None else tl.load(key_lengths + b).to(tl.int32)
        least, most = distances(T, S, window, CAUSAL)
        q += b * stride_qb + h * stride_qh + start_q * stride_qt
        k += b * stride_kb + h // GROUP * stride_kh + start_k * stride_kt
        v += b * stride_vb + h // GROUP * stride_vh + start_k * stride_vt
        o += b * stride_ob + h * stride_oh + start_q * stride_ot
        if bias is not None:
            bias += h * stride_bh + bias_zero
        q_rows = rows_of(q, T, stride_qt, D, BLOCK_T, BLOCK_D, TMA)
        k_rows = rows_of(k, seen_keys, stride_kt, D, BLOCK_S, BLOCK_D, TMA)
        v_rows = rows_of(v, seen_keys, stride_vt, D, BLOCK_S, BLOCK_D, TMA)
        q_tile = load_rows(q_rows, t0, T, stride_qt, D, BLOCK_T, BLOCK_D, TMA, True)
        m = tl.full((BLOCK_T,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_T,), dtype=tl.float32)
        acc = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
        last = tl.minimum(t0 + BLOCK_T, T) - 1
        lo, full_lo, full_hi, hi = block_range(t0, last, least, most, seen_keys, BLOCK_S, BELOW, ABOVE)
        if BELOW:
            m, total, acc = _attend(
                lo, full_lo, q_tile, k_rows, v_rows, bias, m, total, acc,
                t0, T, S, seen_keys, least, most, scale, stride_kt, stride_vt, stride_bt, stride_bs,
                D, BELOW, ABOVE, BLOCK_T, BLOCK_S, BLOCK_D, TMA, True,
            )  # fmt: skip
        m, total, acc = _attend(
            full_lo, full_hi, q_tile, k_rows, v_rows, bias, m, total, acc,
            t0, T, S, seen_keys, least, most, scale, stride_kt, stride_vt, stride_bt, stride_bs,
            D, BELOW, ABOVE, BLOCK_T, BLOCK_S, BLOCK_D, TMA, False,
        )  # fmt: skip
        m, total, acc = _attend(
            full_hi, hi, q_tile, k_rows, v_rows, bias, m, total, acc,
            t0, T, S, seen_keys, least, most, scale, stride_kt, stride_vt, stride_bt, stride_bs,
            D, BELOW, ABOVE, BLOCK_T, BLOCK_S, BLOCK_D, TMA, True,
        )  # fmt: skip
        queries = t0 + tl.arange(0, BLOCK_T)
        saw = total > 0
        # Rows that see nothing: zeros, and the logarithm of no sum.
        acc = acc / tl.where(saw, total, 1.0)[:, None]
        log_sum = tl.where(saw, (m + tl.log2(tl.where(saw, total, 1.0))) * LN_2, float("-inf"))
        tl.store(lse + (b * H + h) * T_all + start_q + queries, log_sum, mask=queries < T)
        store_rows(o, t0, T, stride_ot, acc, D, BLOCK_T, BLOCK_D)


@triton.jit
def _probabilities(
    s, lse_rows, bias, queries, keys, T, S, seen_keys, least, most, scale, stride_bt, stride_bs,
    BELOW: tl.constexpr, ABOVE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(BLOCK_T, BLOCK_S), from the products of queries and keys and the log-sum-exp of the forward."""
    s, unit = with_bias(s, scale, bias, queries, keys, stride_bt, stride_bs, T, S)
    if MASKED:
        s = tl.where(visible(queries, keys, least, most, seen_keys, BELOW, ABOVE), s, float("-inf"))
    return tl.exp2(s * unit - lse_rows[:, None])


@triton.jit
def _add_dq(
    lo, hi, dq_tile, q_tile, do_tile, lse_rows, delta_rows, k_rows, v_rows, bias,
    t0, T, S, seen_keys, least, most, scale, stride_kt, stride_vt, stride_bt, stride_bs,
    D: tl.constexpr, BELOW: tl.constexpr, ABOVE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    queries = t0 + tl.arange(0, BLOCK_T)[:, None]
    for s0 in tl.range(lo, hi, BLOCK_S):
        s0 = tl.multiple_of(s0, BLOCK_S)
        keys = s0 + tl.arange(0, BLOCK_S)[None, :]
        k_tile = load_rows(k_rows, s0, seen_keys, stride_kt, D, BLOCK_S, BLOCK_D, TMA, MASKED)
        v_tile = load_rows(v_rows, s0, seen_keys, stride_vt, D, BLOCK_S, BLOCK_D, TMA, MASKED)
        s = dot(q_tile, tl.trans(k_tile), tl.zeros((BLOCK_T, BLOCK_S), dtype=tl.float32))
        p = _probabilities(
            s, lse_rows, bias, queries, keys, T, S, seen_keys, least, most, scale, stride_bt, stride_bs,
            BELOW, ABOVE, MASKED,
        )  # fmt: skip
        dp = dot(do_tile, tl.trans(v_tile), tl.zeros((BLOCK_T, BLOCK_S), dtype=tl.float32))
        ds = p * (dp - delta_rows[:, None])
        dq_tile = dot(ds.to(k_tile.dtype), k_tile, dq_tile)
    return dq_tile


@triton.jit
def attention_bwd_dq_kernel(
    do, q, k, v, o, lse, delta, dq, bias, cu_seqlens, cu_seqlens_k, key_lengths,
    stride_gb, stride_gh, stride_gt, stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot,  # of o, and of dq
    stride_bh, stride_bt, stride_bs, bias_zero,
    H, T_all, S_all, num_documents, window, scale,
    GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Writes delta, the sum of do * o over a row, for the kernel of dk and dv, which runs after this one."""
    BELOW: tl.constexpr = window is not None
    ABOVE: tl.constexpr = CAUSAL or window is not None
    b, h = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    tile = heaviest_first(tl.program_id(1), tl.num_programs(1), CAUSAL)
    t0, start_q, start_k, T, S = place_of_tile(
        tile, cu_seqlens, cu_seqlens_k, T_all, S_all, num_documents, DOCUMENTS, BLOCK_T, False
    )
    if t0 < T:
        seen_keys = S if key_lengths is None else tl.load(key_lengths + b).to(tl.int32)
        least, most = distances(T, S, window, CAUSAL)
        do += b * stride_gb + h * stride_gh + start_q * stride_gt
        q += b * stride_qb + h * stride_qh + start_q * stride_qt
        k += b * stride_kb + h // GROUP * stride_kh + start_k * stride_kt
        v += b * stride_vb + h // GROUP * stride_vh + start_k * stride_vt
        offset_o = b * stride_ob + h * stride_oh + start_q * stride_ot
        if bias is not None:
            bias += h * stride_bh + bias_zero
        queries = t0 + tl.arange(0, BLOCK_T)
        rows = (b * H + h) * T_all + start_q + queries
        q_tile = load_rows(q, t0, T, stride_qt, D, BLOCK_T, BLOCK_D, False, True)
        do_tile = load_rows(do, t0, T, stride_gt, D, BLOCK_T, BLOCK_D, False, True)
        o_tile = load_rows(o + offset_o, t0, T, stride_ot, D, BLOCK_T, BLOCK_D, False, True)
        delta_rows = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), axis=1)
        tl.store(delta + rows, delta_rows, mask=queries < T)
        lse_rows = lse_in_log2(tl.load(lse + rows, mask=queries < T, other=float("-inf")))
        k_rows = rows_of(k, seen_keys, stride_kt, D, BLOCK_S, BLOCK_D, TMA)
        v_rows = rows_of(v, seen_keys, stride_vt, D, BLOCK_S, BLOCK_D, TMA)
        dq_tile = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
        last = tl.minimum(t0 + BLOCK_T, T) - 1
        lo, full_lo, full_hi, hi = block_range(t0, last, least, most, seen_keys, BLOCK_S, BELOW, ABOVE)
        if BELOW:
            dq_tile = _add_dq(
                lo, full_lo, dq_tile, q_tile, do_tile, lse_rows, delta_rows, k_rows, v_rows, bias,
                t0, T, S, seen_keys, least, most, scale, stride_kt, stride_vt, stride_bt, stride_bs,
                D, BELOW, ABOVE, BLOCK_T, BLOCK_S, BLOCK_D, TMA, True,
            )  # fmt: skip
        dq_tile = _add_dq(
            full_lo, full_hi, dq_tile, q_tile, do_tile, lse_rows, delta_rows, k_rows, v_rows, bias,
            t0, T, S, seen_keys, least, most, scale, stride_kt, stride_vt, stride_bt, stride_bs,
            D, BELOW, ABOVE, BLOCK_T, BLOCK_S, BLOCK_D, TMA, False,
        )  # fmt: skip
        dq_tile = _add_dq(
            full_hi, hi, dq_tile, q_tile, do_tile, lse_rows, delta_rows, k_rows, v_rows, bias,
            t0, T, S, seen_keys, least, most, scale, stride_kt, stride_vt, stride_bt, stride_bs,
            D, BELOW, ABOVE, BLOCK_T, BLOCK_S, BLOCK_D, TMA, True,
        )  # fmt: skip
        store_rows(dq + offset_o, t0, T, stride_ot, dq_tile * scale, D, BLOCK_T, BLOCK_D)


@triton.jit
def _add_dkdv(
    lo, hi, dk_tile, dv_tile, k_tile, v_tile, q_rows, do_rows, lse, delta, bias,
    s0, T, S, seen_keys, least, most, scale, stride_qt, stride_gt, stride_bt, stride_bs,
    D: tl.constexpr, BELOW: tl.constexpr, ABOVE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    # Scores lie with keys down and queries across, so that p and ds are left operands of their products as they are.
    keys = s0 + tl.arange(0, BLOCK_S)[:, None]
    for t0 in tl.range(lo, hi, BLOCK_T):
        t0 = tl.multiple_of(t0, BLOCK_T)
        index = t0 + tl.arange(0, BLOCK_T)
        queries = index[None, :]
        q_tile = load_rows(q_rows, t0, T, stride_qt, D, BLOCK_T, BLOCK_D, TMA, MASKED)
        do_tile = load_rows(do_rows, t0, T, stride_gt, D, BLOCK_T, BLOCK_D, TMA, MASKED)
        if MASKED:
            lse_cols = tl.load(lse + index, mask=index < T, other=float("-inf"))
            delta_cols = tl.load(delta + index, mask=index < T, other=0.0)
        else:
            lse_cols = tl.load(lse + index)
            delta_cols = tl.load(delta + index)
        s = dot(k_tile, tl.trans(q_tile), tl.zeros((BLOCK_S, BLOCK_T), dtype=tl.float32))
        s, unit = with_bias(s, scale, bias, queries, keys, stride_bt, stride_bs, T, S)
        if MASKED:
            s = tl.where(visible(queries, keys, least, most, seen_keys, BELOW, ABOVE), s, float("-inf"))
        p = tl.exp2(s * unit - lse_in_log2(lse_cols)[None, :])
        dv_tile = dot(p.to(do_tile.dtype), do_tile, dv_tile)
        dp = dot(v_tile, tl.trans(do_tile), tl.zeros((BLOCK_S, BLOCK_T), dtype=tl.float32))
        ds = p * (dp - delta_cols[None, :])
        dk_tile = dot(ds.to(q_tile.dtype), q_tile, dk_tile)
    return dk_tile, dv_tile


@triton.jit
def attention_bwd_dkdv_kernel(
    do, q, k, v, lse, delta, dk, dv, bias, cu_seqlens, cu_seqlens_k, key_lengths,
    stride_gb, stride_gh, stride_gt, stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_db, stride_dh, stride_dt,  # of dk and dv
    stride_bh, stride_bt, stride_bs, bias_zero,
    H, T_all, S_all, num_documents, window, scale,
    GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    BELOW: tl.constexpr = window is not None
    ABOVE: tl.constexpr = CAUSAL or window is not None
    H_kv = H // GROUP
    b, h_kv = (tl.program_id(0) // H_kv).to(tl.int64), (tl.program_id(0) % H_kv).to(tl.int64)
    # The first keys are seen by the most queries, and are begun first as they are.
    s0, start_q, start_k, T, S = place_of_tile(
        tl.program_id(1), cu_seqlens, cu_seqlens_k, T_all, S_all, num_documents, DOCUMENTS, BLOCK_S, True
    )
    if s0 < S:
        seen_keys = S if key_lengths is None else tl.load(key_lengths + b).to(tl.int32)
        least, most = distances(T, S, window, CAUSAL)
        k += b * stride_kb + h_kv * stride_kh + start_k * stride_kt
        v += b * stride_vb + h_kv * stride_vh + start_k * stride_vt
        offset_d = b * stride_db + h_kv * stride_dh + start_k * stride_dt
        k_tile = load_rows(k, s0, seen_keys, stride_kt, D, BLOCK_S, BLOCK_D, False, True)
        v_tile = load_rows(v, s0, seen_keys, stride_vt, D, BLOCK_S, BLOCK_D, False, True)
        dk_tile = tl.zeros((BLOCK_S, BLOCK_D), dtype=tl.float32)
        dv_tile = tl.zeros((BLOCK_S, BLOCK_D), dtype=tl.float32)
        last = tl.minimum(s0 + BLOCK_S, S) - 1
        lo, full_lo, full_hi, hi = block_range(s0, last, -most, -least, T, BLOCK_T, ABOVE, BELOW)
        if s0 >= seen_keys:
            lo, full_lo, full_hi, hi = 0, 0, 0, 0
        for h in range(h_kv * GROUP, (h_kv + 1) * GROUP):
            q_head = q + b * stride_qb + h * stride_qh + start_q * stride_qt
            do_head = do + b * stride_gb + h * stride_gh + start_q * stride_gt
            q_rows = rows_of(q_head, T, stride_qt, D, BLOCK_T, BLOCK_D, TMA)
            do_rows = rows_of(do_head, T, stride_gt, D, BLOCK_T, BLOCK_D, TMA)
            offset = (b * H + h) * T_all + start_q
            bias_head = bias
            if bias is not None:
                bias_head = bias + h * stride_bh + bias_zero
            if ABOVE:
                dk_tile, dv_tile = _add_dkdv(
                    lo, full_lo, dk_tile, dv_tile, k_tile, v_tile, q_rows, do_rows, lse + offset, delta + offset,
                    bias_head, s0, T, S, seen_keys, least, most, scale, stride_qt, stride_gt, stride_bt, stride_bs,
                    D, BELOW, ABOVE, BLOCK_T, BLOCK_S, BLOCK_D, TMA, True,
                )  # fmt: skip
            dk_tile, dv_tile = _add_dkdv(
                full_lo, full_hi, dk_tile, dv_tile, k_tile, v_tile, q_rows, do_rows, lse + offset, delta + offset,
                bias_head, s0, T, S, seen_keys, least, most, scale, stride_qt, stride_gt, stride_bt, stride_bs,
                D, BELOW, ABOVE, BLOCK_T, BLOCK_S, BLOCK_D, TMA, False,
            )  # fmt: skip
            dk_tile, dv_tile = _add_dkdv(
                full_hi, hi, dk_tile, dv_tile, k_tile, v_tile, q_rows, do_rows, lse + offset, delta + offset,
                bias_head, s0, T, S, seen_keys, least, most, scale, stride_qt, stride_gt, stride_bt, stride_bs,
                D, BELOW, ABOVE, BLOCK_T, BLOCK_S, BLOCK_D, TMA, True,
            )  # fmt: skip
        # Where no mask was taken, keys that are not seen hold the exponential of anything.
        seen = (s0 + tl.arange(0, BLOCK_S) < seen_keys)[:, None]
        store_rows(dk + offset_d, s0, S, stride_dt, tl.where(seen, dk_tile * scale, 0.0), D, BLOCK_S, BLOCK_D)
        store_rows(dv + offset_d, s0, S, stride_dt, tl.where(seen, dv_tile, 0.0), D, BLOCK_S, BLOCK_D)


@triton.jit
def _tile_of_pair(
    index, first_head, t0, s0, do, q, k, v, lse, delta, bias, cu_seqlens, cu_seqlens_k, key_lengths,
    stride_gb, stride_gh, stride_gt, stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_bh, stride_bt, stride_bs, bias_zero,
    H, T_all, S_all, num_documents, num_heads, window, scale,
    GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The gradient of the scores at (t0, s0) of one batch entry or document, and one of num_heads heads: those that
    index names. Zeros outside."""
    BELOW: tl.constexpr = window is not None
    ABOVE: tl.constexpr = CAUSAL or window is not None
    h = first_head + (index % num_heads).to(tl.int64)
    entry = index // num_heads
    b, start_q, start_k, T, S = entry.to(tl.int64), tl.cast(0, tl.int64), tl.cast(0, tl.int64), T_all, S_all
    if cu_seqlens is not None:
        start_q, start_k, T, S = document_bounds(entry, cu_seqlens, cu_seqlens_k)
        b = tl.cast(0, tl.int64)
    seen_keys = S if key_lengths is None else tl.load(key_lengths + b).to(tl.int32)
    least, most = distances(T, S, window, CAUSAL)
    ds = tl.zeros((BLOCK_T, BLOCK_S), dtype=tl.float32)
    meets = (t0 < T) & (s0 >= 0) & (s0 < seen_keys)
    if ABOVE:
        meets = meets & (s0 - (t0 + BLOCK_T - 1) <= most)
    if BELOW:
        meets = meets & (s0 + BLOCK_S - 1 - t0 >= least)
    if meets:
        q += b * stride_qb + h * stride_qh + start_q * stride_qt
        do += b * stride_gb + h * stride_gh + start_q * stride_gt
        k += b * stride_kb + h // GROUP * stride_kh + start_k * stride_kt
        v += b * stride_vb + h // GROUP * stride_vh + start_k * stride_vt
        queries = t0 + tl.arange(0, BLOCK_T)
        keys = s0 + tl.arange(0, BLOCK_S)
        rows = (b * H + h) * T_all + start_q + queries
        lse_rows = lse_in_log2(tl.load(lse + rows, mask=queries < T, other=float("-inf")))
        delta_rows = tl.load(delta + rows, mask=queries < T, other=0.0)
        s = tl.zeros((BLOCK_T, BLOCK_S), dtype=tl.float32)
        dp = tl.zeros((BLOCK_T, BLOCK_S), dtype=tl.float32)
        # In pieces of the head: whole rows of all four would leave no registers.
        for d in tl.static_range(0, BLOCK_D, DEPTH):
            s = dot(
                load_rows(q + d, t0, T, stride_qt, D - d, BLOCK_T, DEPTH, False, True),
                tl.trans(load_rows(k + d, s0, seen_keys, stride_kt, D - d, BLOCK_S, DEPTH, False, True)),
                s,
            )
            dp = dot(
                load_rows(do + d, t0, T, stride_gt, D - d, BLOCK_T, DEPTH, False, True),
                tl.trans(load_rows(v + d, s0, seen_keys, stride_vt, D - d, BLOCK_S, DEPTH, False, True)),
                dp,
            )
        p = _probabilities(
            s, lse_rows, bias + h * stride_bh + bias_zero, queries[:, None], keys[None, :],
            T, S, seen_keys, least, most, scale, stride_bt, stride_bs, BELOW, ABOVE, True,
        )  # fmt: skip
        ds = p * (dp - delta_rows[:, None])
    return ds


@triton.jit
def attention_bwd_dbias_kernel(
    do, q, k, v, lse, delta, bias, dbias, cu_seqlens, cu_seqlens_k, key_lengths,
    stride_gb, stride_gh, stride_gt, stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_bh, stride_bt, stride_bs, bias_zero,
    H, T_all, S_all, num_documents, num_heads, num_entries, window, scale, n, m,
    GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dbias: (1 or H, n, m), dense. A program owns one tile of one head of it, and sums over the batch or the
    documents (num_entries), and over all num_heads heads where they share the bias."""
    t0, s0 = tl.program_id(0) * BLOCK_T, tl.program_id(1) * BLOCK_S
    head = tl.program_id(2).to(tl.int64)
    total = tl.zeros((BLOCK_T, BLOCK_S), dtype=tl.float32)
    for index in range(0, num_entries * num_heads):
        total += _tile_of_pair(
            index, head, t0, s0, do, q, k, v, lse, delta, bias, cu_seqlens, cu_seqlens_k, key_lengths,
            stride_gb, stride_gh, stride_gt, stride_qb, stride_qh, stride_qt,
            stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
            stride_bh, stride_bt, stride_bs, bias_zero,
            H, T_all, S_all, num_documents, num_heads, window, scale, GROUP, D, CAUSAL, BLOCK_D,
            BLOCK_T, BLOCK_S, DEPTH,
        )  # fmt: skip
    rows, cols = t0 + tl.arange(0, BLOCK_T), s0 + tl.arange(0, BLOCK_S)
    inside = (rows < n)[:, None] & (cols < m)[None, :]
    place = (head * n + rows)[:, None] * m + cols[None, :]
    tl.store(dbias + place, total.to(dbias.dtype.element_ty), mask=inside)


@triton.jit
def attention_bwd_ddistance_kernel(
    do, q, k, v, lse, delta, bias, sums, cu_seqlens, cu_seqlens_k, key_lengths,
    stride_gb, stride_gh, stride_gt, stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_bh, stride_bt, stride_bs, bias_zero,
    H, T_all, S_all, num_documents, num_heads, num_entries, window, scale, first_diagonal, num_tiles,
    GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """sums: (1 or H, diagonals, 2, BLOCK) float32. A program owns a diagonal of tiles, those with s0 - t0 =
    (first_diagonal + program) * BLOCK, and sums them along their own diagonals: of distances up to BLOCK - 1 above
    s0 - t0 into the first row, and of those below, counted from s0 - t0 - BLOCK on, into the second."""
    shift = (first_diagonal + tl.program_id(0)) * BLOCK
    head = tl.program_id(1).to(tl.int64)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for index in range(0, num_entries * num_heads):
        for tile in range(0, num_tiles):
            t0 = tile * BLOCK
            total += _tile_of_pair(
                index, head, t0, t0 + shift, do, q, k, v, lse, delta, bias, cu_seqlens, cu_seqlens_k, key_lengths,
                stride_gb, stride_gh, stride_gt, stride_qb, stride_qh, stride_qt,
                stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
                stride_bh, stride_bt, stride_bs, bias_zero,
                H, T_all, S_all, num_documents, num_heads, window, scale, GROUP, D, CAUSAL, BLOCK_D,
                BLOCK, BLOCK, DEPTH,
            )  # fmt: skip
    row, col = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    # Row r turned left by r: entries of one diagonal come to lie in one column.
    turned = tl.gather(total, (row + col) % BLOCK, axis=1)
    above = row + col < BLOCK
    place = sums + (head * tl.num_programs(0) + tl.program_id(0)) * 2 * BLOCK + tl.arange(0, BLOCK)
    tl.store(place, tl.sum(tl.where(above, turned, 0.0), axis=0))
    tl.store(place + BLOCK, tl.sum(tl.where(above, 0.0, turned), axis=0))


# Launchers.


def _blocks(pairs: list[tuple[int, int, int, int]], *, tma: bool) -> list[Config]:
    """(BLOCK_T, BLOCK_S, warps, stages); with loads by descriptor too, where they are possible."""
    return [
        Config({"BLOCK_T": t, "BLOCK_S": s, "TMA": by_tma}, num_warps=warps, num_stages=stages)
        for by_tma in ((False, True) if tma else (False,))
        for t, s, warps, stages in pairs
    ]


def _configs(which: str, arch: int, q: Tensor, common: dict[str, object], tma: bool) -> list[Config]:
    """which: fwd, dq or dkdv."""
    D = q.shape[-1]
    if arch == INTERPRETER:
        return _blocks([(32, 32, 4, 1)], tma=False) if which != "fwd" else _blocks([(32, 16, 4, 1)], tma=False)
    if q.dtype == torch.float32:  # no tensor cores: the products are made of multiply-adds, with operands in registers
        return _blocks([(32, 32, 8, 1) if D <= 64 else (16, 16, 8, 1)], tma=False)
    # What is not in the table goes by the nearest below: sm_86 and sm_89 by sm_80, and sm_120, which has sm_80's
    # matrix instructions, too.
    family = 100 if 100 <= arch < 120 else 90 if arch == 90 else 80
    many = any(common[name] is not None for name in ("bias", "window", "cu_seqlens"))
    tma = tma and not (many and which == "dkdv")  # making descriptors for every head takes the registers that are left
    return _blocks(_TABLE[which, family, 64 if D <= 64 else 128 if D <= 128 else 256, many], tma=tma)


# By kernel, architecture, padded head width, and whether there is a bias, a window or documents, which take registers.
# None of them spills (tests/kernels/test_compile.py).
_TABLE = {
    ("fwd", 80, 64, False): [(128, 64, 8, 3), (128, 128, 8, 3), (64, 64, 4, 3)],
    ("fwd", 80, 64, True): [(64, 64, 4, 3), (128, 64, 8, 3)],
    ("fwd", 80, 128, False): [(128, 32, 8, 3)],
    ("fwd", 80, 128, True): [(128, 32, 8, 3)],
    ("fwd", 80, 256, False): [(64, 32, 8, 2)],
    ("fwd", 80, 256, True): [(64, 32, 8, 2)],
    ("fwd", 90, 64, False): [(128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)],
    ("fwd", 90, 64, True): [(128, 64, 8, 3), (64, 64, 4, 3)],
    ("fwd", 90, 128, False): [(128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3)],
    ("fwd", 90, 128, True): [(128, 64, 8, 3)],
    ("fwd", 90, 256, False): [(64, 64, 8, 2)],
    ("fwd", 90, 256, True): [(64, 32, 8, 2)],
    ("fwd", 100, 64, False): [(128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3)],
    ("fwd", 100, 64, True): [(128, 64, 8, 3)],
    ("fwd", 100, 128, False): [(128, 128, 8, 2), (128, 64, 8, 3)],
    ("fwd", 100, 128, True): [(128, 64, 8, 3)],
    ("fwd", 100, 256, False): [(64, 64, 8, 2)],
    ("fwd", 100, 256, True): [(64, 64, 8, 2)],
    ("dq", 80, 64, False): [(128, 64, 8, 2), (64, 64, 4, 3)],
    ("dq", 80, 64, True): [(64, 32, 4, 2)],
    ("dq", 80, 128, False): [(64, 64, 8, 2), (64, 32, 4, 2)],
    ("dq", 80, 128, True): [(64, 64, 8, 2)],
    ("dq", 80, 256, False): [(64, 32, 8, 2)],
    ("dq", 80, 256, True): [(32, 32, 8, 1)],
    ("dq", 90, 64, False): [(128, 64, 8, 2), (64, 64, 4, 3)],
    ("dq", 90, 64, True): [(128, 64, 8, 2), (64, 64, 4, 2)],
    ("dq", 90, 128, False): [(128, 64, 8, 2), (64, 64, 4, 2)],
    ("dq", 90, 128, True): [(128, 64, 8, 2)],
    ("dq", 90, 256, False): [(64, 32, 8, 2)],
    ("dq", 90, 256, True): [(64, 32, 8, 2)],
    ("dq", 100, 64, False): [(128, 64, 8, 2), (64, 64, 4, 3)],
    ("dq", 100, 64, True): [(128, 64, 8, 2)],
    ("dq", 100, 128, False): [(128, 64, 8, 2)],
    ("dq", 100, 128, True): [(128, 64, 8, 2)],
    ("dq", 100, 256, False): [(64, 32, 8, 2)],
    ("dq", 100, 256, True): [(64, 32, 8, 2)],
    ("dkdv", 80, 64, False): [(64, 128, 8, 2), (32, 128, 8, 2)],
    ("dkdv", 80, 64, True): [(16, 64, 8, 1)],
    ("dkdv", 80, 128, False): [(64, 64, 8, 2), (32, 64, 8, 2)],
    ("dkdv", 80, 128, True): [(16, 64, 8, 1)],
    ("dkdv", 80, 256, False): [(32, 32, 8, 1)],
    ("dkdv", 80, 256, True): [(16, 32, 8, 1)],
    ("dkdv", 90, 64, False): [(64, 128, 8, 2), (64, 64, 4, 3), (32, 128, 8, 2)],
    ("dkdv", 90, 64, True): [(32, 128, 8, 2)],
    ("dkdv", 90, 128, False): [(32, 128, 8, 2)],
    ("dkdv", 90, 128, True): [(16, 64, 8, 2)],
    ("dkdv", 90, 256, False): [(16, 64, 8, 2)],
    ("dkdv", 90, 256, True): [(16, 32, 8, 1)],
    ("dkdv", 100, 64, False): [(64, 128, 8, 2), (64, 64, 8, 2)],
    ("dkdv", 100, 64, True): [(16, 32, 8, 1)],
    ("dkdv", 100, 128, False): [(32, 64, 8, 2)],
    ("dkdv", 100, 128, True): [(16, 64, 8, 1)],
    ("dkdv", 100, 256, False): [(32, 32, 8, 1)],
    ("dkdv", 100, 256, True): [(16, 32, 8, 1)],
}


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
    return {
        "q": q,
        "k": k,
        "v": v,
        "bias": bias,
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.contiguous(),
        "cu_seqlens_k": cu_seqlens if cu_seqlens_k is None else cu_seqlens_k.contiguous(),
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
            _configs("fwd", arch, q, common, _tma_fits(arch, q, k, v)),
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
            _configs("dq", arch, q, common, _tma_fits(arch, k, v)),
            key,
        )
    if k.numel():
        launch(
            attention_bwd_dkdv_kernel,
            lambda constants: (B * H_kv, _num_tiles(S, constants["BLOCK_S"], cu_seqlens)),
            {**common, **rows, "dk": dk, "dv": dv, **_strides("d", dk)},
            _configs("dkdv", arch, q, common, _tma_fits(arch, do, q)),
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
    block = 64 if 90 <= arch < 120 else 32
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
