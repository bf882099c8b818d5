"""The concepts that all attention kernels share: which document a tile is of, which blocks it meets, which pairs see
each other, the bias between them, the running softmax, and how rows of a head are read.

B batch, H query heads, T queries, S keys, D head width. Distances are key minus query: query i of a document sees key j
if least <= j - i <= most, where causal and window say so, and j is below the number of keys that may be seen.
"""

from __future__ import annotations

import triton
import triton.language as tl

from warploom_kernels._products import dot

# The arguments that every kernel has: tensors and their strides over batch, heads and rows; columns are dense. lse and
# delta are (B, H, T), dense. bias is read at bias + head * stride_bh + query * stride_bt + key * stride_bs: for a bias
# by distance stride_bt is -1, and the pointer is moved to distance 0 by bias_zero.
#
#   cu_seqlens, cu_seqlens_k  (num_documents + 1,) int32, both or none
#   key_lengths               (B,) or None
#   window                    int or None
#   GROUP                     query heads of one key/value head

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


# Tile order and documents.


@triton.jit
def heaviest_first(tile, num_tiles, CAUSAL: tl.constexpr):
    """The last queries see the most keys: begun first, they leave no long tail."""
    return num_tiles - 1 - tile if CAUSAL else tile


@triton.jit
def place_of_tile(
    tile,
    cu_seqlens,
    cu_seqlens_k,
    T,
    S,
    num_documents,
    DOCUMENTS: tl.constexpr,  # num_documents or more, a power of 2
    BLOCK: tl.constexpr,
    OF_KEYS: tl.constexpr,  # tiles are of keys, not of queries
):
    """Number the tiles of all documents through. Returns the tile's first position in its document, where the document
    starts among queries and among keys, and its T and S; for a tile past the last, a position past the end."""
    if cu_seqlens is None:
        start = tl.cast(tile * 0, tl.int64)
        return tile * BLOCK, start, start, T, S
    else:
        tiled = cu_seqlens_k if OF_KEYS else cu_seqlens
        index = tl.arange(0, DOCUMENTS)
        exists = index < num_documents
        lengths = tl.load(tiled + 1 + index, mask=exists, other=0) - tl.load(tiled + index, mask=exists, other=0)
        tiles = (lengths + BLOCK - 1) // BLOCK
        document = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
        # Lanes past the last document have no tiles: they are counted above when the tile is past the end.
        past = document >= num_documents
        document = tl.minimum(document, num_documents - 1)
        first = (tile - tl.sum(tl.where(index < document, tiles, 0), 0)) * BLOCK
        start_q, start_k, n, m = document_bounds(document, cu_seqlens, cu_seqlens_k)
        return tl.where(past, S if OF_KEYS else T, first), start_q, start_k, n, m


@triton.jit
def document_bounds(document, cu_seqlens, cu_seqlens_k):
    """Where it starts among queries and among keys, and how many of both it has."""
    start_q, start_k = tl.load(cu_seqlens + document), tl.load(cu_seqlens_k + document)
    n, m = tl.load(cu_seqlens + document + 1) - start_q, tl.load(cu_seqlens_k + document + 1) - start_k
    return start_q.to(tl.int64), start_k.to(tl.int64), n, m


# Block range.


@triton.jit
def distances(T, S, window, CAUSAL: tl.constexpr):
    """least, most: the last query is opposite the last key."""
    least, most = -(1 << 30), 1 << 30
    if window is not None:
        least = S - T - window + 1
        most = S - T + window - 1
    if CAUSAL:
        most = S - T
    return least, most


@triton.jit
def block_range(
    first, last, least, most, end, BLOCK: tl.constexpr, BOUNDED_BELOW: tl.constexpr, BOUNDED_ABOVE: tl.constexpr
):
    """The blocks of [0, end) that hold an x with least <= x - y <= most for a y in [first, last], as three bounds of
    stretches: [lo, full_lo) and [full_hi, hi) need a mask, in [full_lo, full_hi) each x suits every y."""
    lo, full_lo, hi, full_hi = 0, 0, end, end
    if BOUNDED_BELOW:
        lo = tl.maximum(first + least, 0) // BLOCK * BLOCK
        full_lo = (tl.maximum(last + least, 0) + BLOCK - 1) // BLOCK * BLOCK
    if BOUNDED_ABOVE:
        hi = tl.maximum(tl.minimum(end, last + most + 1), 0)
        full_hi = tl.maximum(tl.minimum(end, first + most + 1), 0)
    full_lo = tl.minimum(full_lo, hi)
    return lo, full_lo, tl.maximum(full_hi // BLOCK * BLOCK, full_lo), hi


# Mask.


@triton.jit
def visible(queries, keys, least, most, seen_keys, BOUNDED_BELOW: tl.constexpr, BOUNDED_ABOVE: tl.constexpr):
    """Which query sees which key; queries and keys are broadcast against each other, either way round."""
    sees = keys < seen_keys
    if BOUNDED_ABOVE:
        sees = sees & (keys - queries <= most)
    if BOUNDED_BELOW:
        sees = sees & (keys - queries >= least)
    return sees


# Bias.


@triton.jit
def with_bias(s, scale, bias, queries, keys, stride_t, stride_s, T, S):
    """Scores in units of log 2, and what is left to multiply them by. Without a bias they stay as they are, so that the
    scale costs nothing: it becomes part of the multiply-add before the exponential."""
    if bias is None:
        return s, scale * LOG2_E
    else:
        inside = (queries < T) & (keys < S)
        added = tl.load(bias + queries * stride_t + keys * stride_s, mask=inside, other=0.0).to(tl.float32)
        return s * (scale * LOG2_E) + added * LOG2_E, 1.0


# Scores.


@triton.jit
def masked_scores(
    products, bias, queries, keys, T, S, seen_keys, least, most, scale, stride_bt, stride_bs,
    BELOW: tl.constexpr, ABOVE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """From the products of queries and keys, either way round as queries and keys are: scores, and what with_bias left
    to multiply them by."""
    s, unit = with_bias(products, scale, bias, queries, keys, stride_bt, stride_bs, T, S)
    if MASKED:
        s = tl.where(visible(queries, keys, least, most, seen_keys, BELOW, ABOVE), s, float("-inf"))
    return s, unit


# Online softmax.


@triton.jit
def online_softmax(s, unit, m, total, acc):
    """One block of scores more: its probabilities, and the running maximum, sum and output brought to that maximum."""
    m_new = tl.maximum(m, tl.max(s, axis=1) * unit)
    # A row that has seen nothing yet has the maximum -inf, and -inf - -inf is NaN.
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s * unit - base[:, None])
    shrink = tl.exp2(m - base)
    return p, m_new, total * shrink + tl.sum(p, axis=1), acc * shrink[:, None]


@triton.jit
def lse_in_log2(lse):
    """exp2(s - lse) is 0 in rows that see nothing, whose lse is -inf."""
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)


@triton.jit
def probabilities(
    products, lse_log2, bias, queries, keys, T, S, seen_keys, least, most, scale, stride_bt, stride_bs,
    BELOW: tl.constexpr, ABOVE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """From the products of queries and keys and the log-sum-exp of the forward, which lies as queries do."""
    s, unit = masked_scores(
        products, bias, queries, keys, T, S, seen_keys, least, most, scale, stride_bt, stride_bs, BELOW, ABOVE, MASKED
    )
    return tl.exp2(s * unit - lse_log2)


# Rows of a head.


@triton.jit
def rows_of(base, length, stride, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr):
    """What load_rows reads (length, D) from: a descriptor for the card's copy engine, or the pointer itself."""
    if TMA:
        return tl.make_tensor_descriptor(base, [length, D], [stride, 1], [BLOCK, BLOCK_D])
    else:
        return base


@triton.jit
def load_rows(
    rows,
    first,
    length,
    stride,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    CHECKED: tl.constexpr,  # the block may reach past length; what is there reads as 0, whatever it holds
):
    """(BLOCK, BLOCK_D) from row `first` on; columns from D on are 0."""
    if TMA:
        return rows.load([first, 0])
    else:
        index = tl.arange(0, BLOCK)
        cols = tl.arange(0, BLOCK_D)
        pointers = rows + tl.cast(first, tl.int64) * stride + index[:, None] * stride + cols[None, :]
        if CHECKED:
            return tl.load(pointers, mask=(first + index < length)[:, None] & (cols < D)[None, :], other=0.0)
        elif D != BLOCK_D:
            return tl.load(pointers, mask=(cols < D)[None, :], other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def products_of_rows(
    a, first_a, length_a, stride_a, b, first_b, length_b, stride_b,
    D: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """(BLOCK_A, BLOCK_B): rows of a with rows of b, both read in pieces of DEPTH columns, for where whole rows would
    leave no registers."""
    products = tl.zeros((BLOCK_A, BLOCK_B), dtype=tl.float32)
    for d in tl.static_range(0, BLOCK_D, DEPTH):
        a_piece = load_rows(a + d, first_a, length_a, stride_a, D - d, BLOCK_A, DEPTH, False, True)
        b_piece = load_rows(b + d, first_b, length_b, stride_b, D - d, BLOCK_B, DEPTH, False, True)
        products = dot(a_piece, tl.trans(b_piece), products)
    return products


@triton.jit
def store_rows(base, first, length, stride, values, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    index = tl.arange(0, BLOCK)
    cols = tl.arange(0, BLOCK_D)
    pointers = base + tl.cast(first, tl.int64) * stride + index[:, None] * stride + cols[None, :]
    mask = (first + index < length)[:, None] & (cols < D)[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=mask)
