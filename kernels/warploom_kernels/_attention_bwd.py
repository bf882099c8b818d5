"""Attention's backward kernels: who owns queries makes dq, who owns keys makes dk and dv. Both make the probabilities
again from the log-sum-exp of the forward. What the arguments are is said in _attention_parts.py."""

from __future__ import annotations

import triton
import triton.language as tl

from warploom_kernels._attention_parts import (
    block_range,
    distances,
    heaviest_first,
    load_rows,
    lse_in_log2,
    place_of_tile,
    probabilities,
    products_of_rows,
    rows_of,
    store_rows,
)
from warploom_kernels._products import dot


@triton.jit
def _add_dq(
    lo, hi, dq_tile, q, do, q_tile, do_tile, lse_rows, delta_rows, k_rows, v_rows, bias,
    t0, T, S, seen_keys, least, most, scale, stride_qt, stride_gt, stride_kt, stride_vt, stride_bt, stride_bs,
    D: tl.constexpr, BELOW: tl.constexpr, ABOVE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    # Without tensor cores a thread holds whole rows of both operands: wider ones spill with any tiles.
    IN_PIECES: tl.constexpr = q_tile.dtype == tl.float32 and BLOCK_D > 128
    queries = t0 + tl.arange(0, BLOCK_T)[:, None]
    for s0 in tl.range(lo, hi, BLOCK_S):
        s0 = tl.multiple_of(s0, BLOCK_S)
        keys = s0 + tl.arange(0, BLOCK_S)[None, :]
        k_tile = load_rows(k_rows, s0, seen_keys, stride_kt, D, BLOCK_S, BLOCK_D, TMA, MASKED)
        if IN_PIECES:
            s = products_of_rows(
                q, t0, T, stride_qt, k_rows, s0, seen_keys, stride_kt, D, BLOCK_T, BLOCK_S, BLOCK_D, 64
            )
        else:
            v_tile = load_rows(v_rows, s0, seen_keys, stride_vt, D, BLOCK_S, BLOCK_D, TMA, MASKED)
            s = dot(q_tile, tl.trans(k_tile), tl.zeros((BLOCK_T, BLOCK_S), dtype=tl.float32))
        p = probabilities(
            s, lse_rows[:, None], bias, queries, keys, T, S, seen_keys, least, most, scale, stride_bt, stride_bs,
            BELOW, ABOVE, MASKED,
        )  # fmt: skip
        if IN_PIECES:
            dp = products_of_rows(
                do, t0, T, stride_gt, v_rows, s0, seen_keys, stride_vt, D, BLOCK_T, BLOCK_S, BLOCK_D, 64
            )
        else:
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
        bounds = block_range(t0, last, least, most, seen_keys, BLOCK_S, BELOW, ABOVE)
        for stretch in tl.static_range(0 if BELOW else 1, 3):
            dq_tile = _add_dq(
                bounds[stretch], bounds[stretch + 1], dq_tile, q, do, q_tile, do_tile, lse_rows, delta_rows,
                k_rows, v_rows, bias, t0, T, S, seen_keys, least, most, scale,
                stride_qt, stride_gt, stride_kt, stride_vt, stride_bt, stride_bs,
                D, BELOW, ABOVE, BLOCK_T, BLOCK_S, BLOCK_D, TMA, stretch != 1,
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
        p = probabilities(
            s, lse_in_log2(lse_cols)[None, :], bias, queries, keys, T, S, seen_keys, least, most, scale,
            stride_bt, stride_bs, BELOW, ABOVE, MASKED,
        )  # fmt: skip
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
        end = tl.where(s0 < seen_keys, T, 0)
        bounds = block_range(s0, last, -most, -least, end, BLOCK_T, ABOVE, BELOW)
        for h in range(h_kv * GROUP, (h_kv + 1) * GROUP):
            q_head = q + b * stride_qb + h * stride_qh + start_q * stride_qt
            do_head = do + b * stride_gb + h * stride_gh + start_q * stride_gt
            q_rows = rows_of(q_head, T, stride_qt, D, BLOCK_T, BLOCK_D, TMA)
            do_rows = rows_of(do_head, T, stride_gt, D, BLOCK_T, BLOCK_D, TMA)
            offset = (b * H + h) * T_all + start_q
            bias_head = bias
            if bias is not None:
                bias_head = bias + h * stride_bh + bias_zero
            for stretch in tl.static_range(0 if ABOVE else 1, 3):
                dk_tile, dv_tile = _add_dkdv(
                    bounds[stretch], bounds[stretch + 1], dk_tile, dv_tile, k_tile, v_tile, q_rows, do_rows,
                    lse + offset, delta + offset, bias_head,
                    s0, T, S, seen_keys, least, most, scale, stride_qt, stride_gt, stride_bt, stride_bs,
                    D, BELOW, ABOVE, BLOCK_T, BLOCK_S, BLOCK_D, TMA, stretch != 1,
                )  # fmt: skip
        # Where no mask was taken, keys that are not seen hold the exponential of anything.
        seen = (s0 + tl.arange(0, BLOCK_S) < seen_keys)[:, None]
        store_rows(dk + offset_d, s0, S, stride_dt, tl.where(seen, dk_tile * scale, 0.0), D, BLOCK_S, BLOCK_D)
        store_rows(dv + offset_d, s0, S, stride_dt, tl.where(seen, dv_tile, 0.0), D, BLOCK_S, BLOCK_D)
