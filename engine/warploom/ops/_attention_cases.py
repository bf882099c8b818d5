"""What attention is tested and timed on; see Case, BadCase and BenchCase in _op.py."""

from __future__ import annotations

import torch

from warploom.ops._op import BadCase, BenchCase, Case


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

CASES = (
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
    Case("wide_160", _case(1, 2, 40, 160, H_kv=1, S=50, causal=True, window=20, lengths=[45])),
    Case("wide_200_packed_bias", _case(1, 2, 60, 200, offsets=[0, 20, 60], causal=True, bias_heads=2)),
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
        _case(1, 4, 150, 64, H_kv=2, S=220, offsets=[0, 70, 70, 73, 150], offsets_k=[0, 3, 40, 140, 220], causal=True),
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
)

BAD_CASES = (
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
)

BENCH_CASES = (
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
)
