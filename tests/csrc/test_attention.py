"""The C++ attention kernel alone: its rounding at every instruction-set level, determinism, what it reads and writes.

What every back end of the op must do is in tests/ops/test_contract.py.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from warploom.ops import _extension
from warploom.ops._attention_reference import attention_reference

if _extension.missing:
    pytest.skip(_extension.missing, allow_module_level=True)

CPU = torch.ops.warploom_cpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Half a unit in the last place, relative.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-11, torch.float64: 2**-53}
UNUSUAL_LEVELS = [level for level in CPU.levels() if level != CPU.level()]
T_AND_S = [(1, 1), (7, 7), (63, 65), (65, 63), (257, 257), (1, 257), (257, 1)]


@pytest.fixture(autouse=True)
def one_thread():
    """On tensors this small a second thread only waits, at full load: three times the run time on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(*shape, dtype, seed):
    """(B, H, T, D) as the projections of a model hand it over: a transposed view."""
    B, H, T, D = shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, H, D, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)


def inputs(B, H, H_kv, T, S, D, dtype):
    return (
        draw(B, H, T, D, dtype=dtype, seed=0),
        draw(B, H_kv, S, D, dtype=dtype, seed=1),
        draw(B, H_kv, S, D, dtype=dtype, seed=2),
        draw(B, H, T, D, dtype=dtype, seed=3),
    )


def run(
    q,
    k,
    v,
    do,
    *,
    bias=None,
    cu_seqlens=None,
    cu_seqlens_k=None,
    key_lengths=None,
    causal=False,
    window=None,
    softmax_scale=None,
    need_dbias=None,
):
    """o, dq, dk, dv, dbias of the kernel."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    masks = (bias, cu_seqlens, cu_seqlens_k, key_lengths, causal, window, scale)
    o, lse = CPU.attention_fwd(q, k, v, *masks)
    need_dbias = bias is not None if need_dbias is None else need_dbias
    return o, *CPU.attention_bwd(do, q, k, v, o, lse, *masks, need_dbias)


def forward(q, k, v, *, key_lengths=None, causal=False, softmax_scale=1.0):
    """o and lse of the kernel."""
    return CPU.attention_fwd(q, k, v, None, None, None, key_lengths, causal, None, softmax_scale)


def differentiate(function, q, k, v, do, bias):
    """o, dq, dk, dv, dbias by autograd."""
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v, bias) if tensor is not None]
    o = function(*leaves)
    return o.detach(), *torch.autograd.grad(o, leaves, do)


def assert_rounds_like_torch(q, k, v, do, *, bias=None, softmax_scale=None, **masks):
    """Against float64: at most twice the error of torch's own attention in the same dtype, plus three roundings: of the
    result; of the exponents, scores less a log-sum-exp, each rounded before; and of the two sums over D
    in dp - delta, of which little may be left."""

    def exact(q, k, v, bias=None):
        return attention_reference(q, k, v, bias=bias, softmax_scale=softmax_scale, **masks)

    def of_torch(q, k, v, bias=None):
        T, S = q.shape[2], k.shape[2]
        visible = torch.ones(T, S, dtype=torch.bool)
        if masks.get("causal"):
            visible = visible.tril(S - T)
        if masks.get("window") is not None:
            visible = visible.triu(S - T - masks["window"] + 1).tril(S - T + masks["window"] - 1)
        if masks.get("key_lengths") is not None:
            visible = visible & (torch.arange(S) < masks["key_lengths"][:, None, None, None])
        if bias is None:
            mask = torch.zeros(T, S, dtype=q.dtype)
        else:
            mask = bias if bias.dim() == 3 else bias[:, T - 1 + torch.arange(S) - torch.arange(T)[:, None]]
        mask = mask.masked_fill(~visible, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, mask, scale=softmax_scale, enable_gqa=True)

    wide = [None if tensor is None else tensor.double() for tensor in (q, k, v, do, bias)]
    references = differentiate(exact, *wide)
    peers = differentiate(of_torch, q, k, v, do, bias)
    u, of_sums = ROUNDING[q.dtype], min(ROUNDING[q.dtype], 2**-24)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else abs(softmax_scale)
    group, rows = q.shape[1] // k.shape[1], max(q.shape[2], k.shape[2])
    scores = scale * wide[0] @ wide[1].mT.repeat_interleave(group, 1)
    exponent = scores.abs().max() + scores.logsumexp(-1).abs().max()
    spread = differentiate(exact, *wide[:2], *(tensor.abs() for tensor in wide[2:4]), wide[4])  # p |v|, ..., p^T |do|
    dp = (wide[3].abs() @ wide[2].abs().mT.repeat_interleave(group, 1)).max()
    cancelled = of_sums * dp * scale * max(q.abs().max(), k.abs().max()) * rows**0.5
    of_exponent = {"o": of_sums * exponent * spread[0].max(), "dv": of_sums * exponent * spread[3].max()}
    results = run(q, k, v, do, bias=bias, softmax_scale=softmax_scale, **masks)
    for name, result, peer, reference in zip(
        ("o", "dq", "dk", "dv", "dbias"), results, peers, references, strict=False
    ):
        error, of_peer = (result.double() - reference).abs().max(), (peer.double() - reference).abs().max()
        allowed = 2 * of_peer + 2 * u * reference.abs().max() + of_exponent.get(name, cancelled)
        assert error <= allowed, f"{name}: error {error:.3g}, of torch {of_peer:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 16, 40, 64, 80, 96, 128, 256])
def test_head_widths(D, dtype):
    assert_rounds_like_torch(*inputs(1, 2, 1, 65, 70, D, dtype), causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("T", "S"), T_AND_S)
def test_lengths(T, S, causal, dtype):
    if causal and T > S:  # torch gives NaN gradients for everything if a row sees nothing: keep to rows that see some
        T = S
    assert_rounds_like_torch(*inputs(1, 2, 1, T, S, 64, dtype), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_long_head(dtype):
    """One head is less work than there are processors, so that its query rows are split."""
    assert_rounds_like_torch(*inputs(1, 1, 1, 600, 600, 40, dtype), causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_heads", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_bias(causal, bias_heads, dtype):
    bias = draw(1, bias_heads, 90, 130, dtype=dtype, seed=4)[0].contiguous()
    assert_rounds_like_torch(*inputs(2, 4, 2, 90, 130, 40, dtype), bias=bias, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_heads", [1, 4])
@pytest.mark.parametrize(("T", "S", "causal"), [(90, 130, True), (130, 90, False), (1, 70, False)])
def test_bias_by_distance(T, S, causal, bias_heads, dtype):
    bias = draw(1, 1, bias_heads, T + S - 1, dtype=dtype, seed=4)[0, 0].contiguous()
    assert_rounds_like_torch(*inputs(2, 4, 2, T, S, 40, dtype), bias=bias, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_distance", [False, True])
def test_bias_of_one_long_head(by_distance, dtype):
    """Split by query rows, all of which have a part in every sum of a bias by distance."""
    bias = draw(1, 1, 600, 1199 if by_distance else 600, dtype=dtype, seed=4)[0].contiguous()
    bias = bias[:, 0] if by_distance else bias
    assert_rounds_like_torch(*inputs(1, 1, 1, 600, 600, 16, dtype), bias=bias, causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_distance", [False, True])
def test_a_bias_without_gradient_changes_no_other(by_distance, dtype):
    q, k, v, do = inputs(2, 4, 2, 70, 90, 40, dtype)
    bias = draw(1, 4, 70, 90, dtype=dtype, seed=4)[0].contiguous()
    bias = draw(1, 1, 4, 159, dtype=dtype, seed=4)[0, 0].contiguous() if by_distance else bias
    all_of_them = run(q, k, v, do, bias=bias, causal=True)
    without = run(q, k, v, do, bias=bias, causal=True, need_dbias=False)
    assert without[4].shape == (0,)
    assert all(torch.equal(a, b) for a, b in zip(all_of_them[:4], without[:4], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("T", "S", "window"), [(150, 150, 1), (150, 200, 33), (200, 200, 70), (1, 150, 20)])
def test_windows(T, S, window, causal, dtype):
    assert_rounds_like_torch(*inputs(1, 2, 1, T, S, 40, dtype), causal=causal, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
def test_windows_never_read_what_they_hide(dtype):
    """NaN there reaches nothing: blocks of keys before the first window and after the last are not computed."""
    q, k, v, do = inputs(1, 2, 1, 60, 700, 32, dtype)
    expected = run(q, k[:, :, 512:], v[:, :, 512:], do, causal=True, window=64)
    k[:, :, :512] = v[:, :, :512] = float("nan")
    o, dq, dk, dv, _ = run(q, k, v, do, causal=True, window=64)
    for result, other in (
        (o, expected[0]),
        (dq, expected[1]),
        (dk[:, :, 512:], expected[2]),
        (dv[:, :, 512:], expected[3]),
    ):
        torch.testing.assert_close(result, other)
    assert not dk[:, :, :512].any() and not dv[:, :, :512].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "H_kv", "T"), [(4, 4, 1), (4, 1, 1), (2, 2, 3)])
def test_few_rows_of_queries(H, H_kv, T, dtype):
    """Decoding: up to some number of rows, keys and values are read where they are."""
    assert_rounds_like_torch(*inputs(2, H, H_kv, T, 301, 72, dtype), key_lengths=torch.tensor([301, 200]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softmax_scale", [-0.3, 0.0, 1.5])
def test_softmax_scales(softmax_scale, dtype):
    assert_rounds_like_torch(*inputs(1, 2, 2, 70, 70, 32, dtype), causal=True, softmax_scale=softmax_scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_bias_with_a_narrower_dtype(dtype):
    q, k, v, do = inputs(2, 2, 2, 33, 47, 16, dtype)
    bias = draw(1, 2, 33, 47, dtype=torch.bfloat16, seed=4)[0].contiguous()
    narrow = run(q, k, v, do, bias=bias.to(dtype))
    mixed = run(q, k, v, do, bias=bias.float())
    assert mixed[4].dtype == torch.float32
    assert torch.equal(mixed[4].to(dtype).float(), narrow[4].float())
    assert all(torch.equal(a, b) for a, b in zip(mixed[:4], narrow[:4], strict=True))


def test_lse_is_the_natural_logarithm_of_the_sum():
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 1e-5), (torch.float64, 1e-13)):
        q, k, v, _ = inputs(2, 4, 2, 100, 130, 64, dtype)
        _, lse = forward(q, k, v, softmax_scale=0.125)
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        scores = 0.125 * q.double() @ k.double().repeat_interleave(2, 1).mT
        torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_documents_are_computed_as_if_alone(causal, dtype):
    offsets = [0, 1, 2, 70, 70, 200]
    q, k, v, do = inputs(1, 4, 2, 200, 200, 40, dtype)
    packed = run(q, k, v, do, cu_seqlens=torch.tensor(offsets, dtype=torch.int32), causal=causal)
    for start, end in zip(offsets, offsets[1:], strict=False):
        alone = run(*(tensor[:, :, start:end] for tensor in (q, k, v, do)), causal=causal)
        assert all(torch.equal(a[:, :, start:end], b) for a, b in zip(packed[:4], alone[:4], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_documents_with_keys_of_other_lengths(causal, dtype):
    queries, keys = [0, 40, 41, 41, 150], [0, 3, 100, 130, 170]
    q, k, v, do = inputs(1, 4, 2, 150, 170, 40, dtype)
    offsets = [torch.tensor(ends, dtype=torch.int32) for ends in (queries, keys)]
    options = {"causal": causal, "window": 60}
    packed = run(q, k, v, do, cu_seqlens=offsets[0], cu_seqlens_k=offsets[1], **options)
    for a, b, c, d in zip(queries, queries[1:], keys, keys[1:], strict=False):
        alone = run(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], do[:, :, a:b], **options)
        for result, other, ends in zip(packed[:4], alone[:4], ((a, b), (a, b), (c, d), (c, d)), strict=True):
            assert torch.equal(result[:, :, slice(*ends)], other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_documents_share_a_bias_by_distance(dtype):
    offsets = [0, 70, 73, 200]
    q, k, v, do = inputs(1, 2, 2, 200, 200, 16, dtype)
    bias = draw(1, 1, 2, 2 * 130 - 1, dtype=torch.float32, seed=4)[0, 0].contiguous()
    packed = run(q, k, v, do, bias=bias, cu_seqlens=torch.tensor(offsets, dtype=torch.int32), causal=True)
    dbias = torch.zeros_like(bias)
    for start, end in zip(offsets, offsets[1:], strict=False):
        middle = slice(130 - (end - start), 130 + (end - start) - 1)
        alone = run(*(tensor[:, :, start:end] for tensor in (q, k, v, do)), bias=bias[:, middle], causal=True)
        assert all(torch.equal(a[:, :, start:end], b) for a, b in zip(packed[:4], alone[:4], strict=True))
        dbias[:, middle] += alone[4]
    torch.testing.assert_close(packed[4], dbias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [0, 1, 64, 83])
def test_keys_beyond_their_length_do_not_exist(length, dtype):
    q, k, v, do = inputs(1, 2, 1, 70, 83, 64, dtype)
    expected = run(q, k[:, :, :length], v[:, :, :length], do)
    k[:, :, length:] = v[:, :, length:] = float("nan")
    o, dq, dk, dv, _ = run(q, k, v, do, key_lengths=torch.tensor([length]))
    assert torch.equal(o, expected[0])
    assert torch.equal(dq, expected[1])
    for gradient, of_the_seen in ((dk, expected[2]), (dv, expected[3])):
        assert torch.equal(gradient[:, :, :length], of_the_seen)
        assert not gradient[:, :, length:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_nothing(dtype):
    q, k, v, do = inputs(1, 2, 1, 150, 20, 32, dtype)
    blind = 150 - 20
    o, dq, dk, dv, _ = run(q, k, v, do, causal=True)
    _, lse = forward(q, k, v, causal=True, softmax_scale=32**-0.5)
    assert (lse[:, :, :blind] == float("-inf")).all()
    assert lse[:, :, blind:].isfinite().all()
    assert not o[:, :, :blind].any()
    assert not dq[:, :, :blind].any()
    seeing = run(q[:, :, blind:], k, v, do[:, :, blind:], causal=True)
    for result, expected in ((o[:, :, blind:], seeing[0]), (dq[:, :, blind:], seeing[1]), (dk, seeing[2])):
        torch.testing.assert_close(result, expected)
    torch.testing.assert_close(dv, seeing[3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "H", "H_kv", "T", "bias_shape"),
    [
        (4, 6, 3, 150, None),
        (1, 3, 1, 300, None),
        (2, 4, 2, 150, (4, 150, 150)),
        (3, 2, 1, 150, (1, 150, 150)),
        (2, 1, 1, 600, (1, 600, 600)),
        (2, 4, 2, 150, (4, 299)),
        (1, 1, 1, 600, (1, 1199)),
    ],
)
def test_bitwise_equal_over_repeats_and_threads(B, H, H_kv, T, bias_shape, dtype):
    q, k, v, do = inputs(B, H, H_kv, T, T, 40, dtype)
    generator = torch.Generator().manual_seed(4)
    bias = None if bias_shape is None else torch.randn(bias_shape, generator=generator).to(dtype)
    alone = run(q, k, v, do, bias=bias, causal=True)
    torch.set_num_threads(2)
    for _ in range(5):
        together = run(q, k, v, do, bias=bias, causal=True)
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.fixture
def poisoned_outputs():
    """Memory of new tensors starts as NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_shape", [None, (2, 70, 90), (2, 159)])
def test_outputs_are_written_whole_and_scratch_is_not_trusted(bias_shape, dtype, poisoned_outputs):
    q, k, v, do = inputs(2, 2, 1, 70, 90, 40, dtype)
    generator = torch.Generator().manual_seed(4)
    bias = None if bias_shape is None else torch.randn(bias_shape, generator=generator).to(dtype)
    masks = {"key_lengths": torch.tensor([90, 0]), "causal": True, "bias": bias}
    clean = run(q, k, v, do, **masks)
    assert all(tensor.isfinite().all() for tensor in clean)
    nans = [torch.full((2, heads, 200, 256), float("nan"), dtype=dtype) for heads in (2, 1, 1, 2)]
    assert run(*nans)[0].isnan().all()  # and so is the scratch memory now
    again = run(q, k, v, do, **masks)
    assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_that_rise_far_above_the_first_ones(dtype):
    """What is subtracted from a row's scores comes from its first keys, until later ones exceed it by much."""
    q, k, v, do = inputs(1, 2, 2, 40, 700, 16, dtype)
    k = (k * torch.linspace(0.1, 60, 700)[:, None]).to(dtype)
    assert_rounds_like_torch(q, k, v, do, causal=True)
    assert_rounds_like_torch(q, k.flip(2), v, do, causal=True)
    assert_rounds_like_torch(q[:, :, :1], k, v, do[:, :, :1])


@pytest.mark.parametrize(
    ("T", "D", "dtype"), [(33, 24, torch.float32), (48, 32, torch.float32), (160, 64, torch.bfloat16)]
)
def test_layouts(T, D, dtype):
    """Any strides come in; what goes out transposes to a contiguous (B, T, H, D)."""
    q, k, v, do = inputs(2, 4, 2, T, T + 7, D, dtype)
    results = run(q, k, v, do)
    assert all(tensor.transpose(1, 2).is_contiguous() for tensor in results[:4])
    of_contiguous = run(*(tensor.contiguous() for tensor in (q, k, v, do)))
    of_strided_rows = run(*(tensor.mT.contiguous().mT for tensor in (q, k, v, do)))
    of_slices = run(*(torch.cat([tensor, tensor], -1)[..., :D] for tensor in (q, k, v, do)))
    of_broadcast = run(q, k[:1].expand_as(k), v[:1].expand_as(v), do)
    for results_of_layout in (of_contiguous, of_strided_rows, of_slices):
        assert all(torch.equal(a, b) for a, b in zip(results, results_of_layout, strict=True))
    assert torch.equal(of_broadcast[0][0], results[0][0])


def test_nan_and_infinity_reach_their_rows_only():
    q, k, v, do = inputs(1, 1, 1, 100, 100, 16, torch.float32)
    clean = run(q, k, v, do, causal=True)[0]
    q[0, 0, 40, 3] = float("nan")
    o = run(q, k, v, do, causal=True)[0]
    assert o[0, 0, 40].isnan().all()
    others = [row for row in range(100) if row != 40]
    assert torch.equal(o[0, 0, others], clean[0, 0, others])


def test_direct_calls_cannot_read_out_of_bounds():
    q, k, v, do = inputs(2, 4, 2, 8, 9, 16, torch.float32)
    ends = {n: torch.tensor([0, n], dtype=torch.int32) for n in (8, 9)}
    one = q[:1], k[:1], v[:1]
    for operands, masks, match in (
        ((q, k[:, :, :, :8], v), {}, "k must be"),
        ((q, k, v[:, :, :5]), {}, "v must be"),
        ((q, k, v), {"key_lengths": torch.tensor([9, 10])}, "key_lengths must be"),
        ((q, k, v), {"bias": q.new_zeros(4, 7, 9)}, "bias must cover"),
        ((q, k, v), {"bias": q.new_zeros(4, 15)}, "bias must cover"),
        ((q, k, v), {"bias": q.new_zeros(4)}, "bias must be"),
        ((q, k, v), {"window": 0}, "window must be"),
        ((q, k, v), {"cu_seqlens_k": ends[9]}, "cu_seqlens_k needs"),
        (one, {"cu_seqlens": ends[9]}, "cu_seqlens must rise"),
        (one, {"cu_seqlens": ends[8]}, "cu_seqlens must rise"),
        (one, {"cu_seqlens": ends[8], "cu_seqlens_k": ends[8]}, "cu_seqlens_k must rise"),
        (
            one,
            {"cu_seqlens": ends[8], "cu_seqlens_k": torch.tensor([0, 1, 9], dtype=torch.int32)},
            "cu_seqlens_k must have 2",
        ),
        (
            one,
            {"cu_seqlens": ends[8], "cu_seqlens_k": ends[9], "bias": q.new_zeros(4, 15)},
            "bias must cover",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            run(*operands, do, **masks)
    with pytest.raises(ValueError, match="lse must be"):
        CPU.attention_bwd(do, q, k, v, q, q.new_zeros(2, 4, 7), None, None, None, None, False, None, 1.0, False)
    with pytest.raises(ValueError, match="need_dbias must be"):
        run(q, k, v, do, need_dbias=True)


def test_level_in_use():
    """Control of test_every_level: the variable reaches the kernels."""
    assert CPU.level() == os.environ.get("WARPLOOM_CPU_LEVEL", CPU.levels()[-1])


@pytest.mark.parametrize("level", UNUSUAL_LEVELS)
def test_every_level(level):
    """The level is chosen once per process, so the tests of what differs run again in one with that level forced."""
    if "WARPLOOM_CPU_LEVEL" in os.environ:
        pytest.skip("already inside a process with a forced level")
    chosen = "level_in_use or head_widths or test_bias or windows or few_rows or rise_far or layouts"
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-x", "-p", "no:cacheprovider", "-k", chosen]
    environment = {**os.environ, "WARPLOOM_CPU_LEVEL": level}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert "passed" in result.stdout
