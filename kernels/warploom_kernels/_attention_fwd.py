"""Attention's forward kernel: a program owns a tile of queries and walks over the keys they see."""

from __future__ import annotations

import triton
import triton.language as tl

from warploom_kernels._attention_parts import (
    LN_2,
    block_range,
    distances,
    heaviest_first,
    load_rows,
    masked_scores,
    online_softmax,
    place_of_tile,
    rows_of,
    store_rows,
)
from warploom_kernels._products import dot


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
        products = dot(q_tile, tl.trans(k_tile), tl.zeros((BLOCK_T, BLOCK_S), dtype=tl.float32))
        s, unit = masked_scores(
            products, bias, queries, keys, T, S, seen_keys, least, most, scale, stride_bt, stride_bs,
            BELOW, ABOVE, MASKED,
        )  # fmt: skip
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
        bounds = block_range(t0, last, least, most, seen_keys, BLOCK_S, BELOW, ABOVE)
        for stretch in tl.static_range(0 if BELOW else 1, 3):
            m, total, acc = _attend(
                bounds[stretch], bounds[stretch + 1], q_tile, k_rows, v_rows, bias, m, total, acc,
                t0, T, S, seen_keys, least, most, scale, stride_kt, stride_vt, stride_bt, stride_bs,
                D, BELOW, ABOVE, BLOCK_T, BLOCK_S, BLOCK_D, TMA, stretch != 1,
            )  # fmt: skip
        queries = t0 + tl.arange(0, BLOCK_T)
        saw = total > 0
        # Rows that see nothing: zeros, and the logarithm of no sum.
        acc = acc / tl.where(saw, total, 1.0)[:, None]
        log_sum = tl.where(saw, (m + tl.log2(tl.where(saw, total, 1.0))) * LN_2, float("-inf"))
        tl.store(lse + (b * H + h) * T_all + start_q + queries, log_sum, mask=queries < T)
        store_rows(o, t0, T, stride_ot, acc, D, BLOCK_T, BLOCK_D)
