"""The gradient of attention's bias: a program owns a tile of it, or a diagonal of tiles of a bias by distance, and sums
over the batch or the documents. What the arguments are is said in _attention_parts.py."""

from __future__ import annotations

import triton
import triton.language as tl

from warploom_kernels._attention_parts import (
    distances,
    document_bounds,
    lse_in_log2,
    probabilities,
    products_of_rows,
)


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
        s = products_of_rows(q, t0, T, stride_qt, k, s0, seen_keys, stride_kt, D, BLOCK_T, BLOCK_S, BLOCK_D, DEPTH)
        dp = products_of_rows(do, t0, T, stride_gt, v, s0, seen_keys, stride_vt, D, BLOCK_T, BLOCK_S, BLOCK_D, DEPTH)
        p = probabilities(
            s, lse_rows[:, None], bias + h * stride_bh + bias_zero, queries[:, None], keys[None, :],
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
