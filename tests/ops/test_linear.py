"""What is special to linear beside the contract tests: the bit mask by which a GPU's backward derives ReLU."""

import pytest
import torch

from warploom.ops import REGISTRY, _extension, backend
from warploom.ops._op import BackendUnavailable

OPERATORS = torch.ops.warploom


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("F", [1, 8, 127, 129, 300])
def test_the_mask_says_where_the_output_is_positive(F):
    x, weight, dy = draw(5, 7), draw(F, 7), draw(5, F)
    with backend("reference"):
        y, mask = OPERATORS.linear_fwd(x, weight, None, None, "relu", True)
        assert mask.shape == (5, -(-F // 128) * 16)
        for n, f in [(n, f) for n in range(5) for f in range(F)]:
            assert bool(mask[n, f // 8] >> (f % 8) & 1) == bool(y[n, f] > 0)
        by_mask, by_output = (
            OPERATORS.linear_bwd(dy, x, weight, None, saved, "relu", True, True, True) for saved in (mask, y)
        )
        assert all(torch.equal(a, b) for a, b in zip(by_mask, by_output, strict=True))


@pytest.mark.skipif(_extension.missing is not None, reason=str(_extension.missing))
def test_the_cpu_kernels_leave_the_mask():
    x, weight = draw(5, 7), draw(9, 7)
    with backend(linear="cpu"), pytest.raises(BackendUnavailable, match="no bit mask"):
        OPERATORS.linear_fwd(x, weight, None, None, "relu", True)
    with backend("reference"):
        y, mask = OPERATORS.linear_fwd(x, weight, None, None, "relu", True)
    with backend(linear="cpu"), pytest.raises(BackendUnavailable, match="no bit mask"):
        OPERATORS.linear_bwd(y, x, weight, None, mask, "relu", True, True, True)


def why_left_to_torch(rows, activation, dtype=torch.float32, *, C=8, F=16, transposed=False):
    x, weight = draw(rows, C).to(dtype), draw(C, F).mT if transposed else draw(F, C)
    return REGISTRY["linear"].backends["cpu"].slower["fwd"](x, weight, None, None, activation, False)


@pytest.mark.parametrize(("activation", "enough"), [("gelu", 32), ("silu", 32), ("relu", 256), ("relu2", 256)])
def test_float32_is_left_to_torch_between_few_rows_and_many(activation, enough):
    assert why_left_to_torch(16, activation) is None
    assert f"fewer than {enough} rows" in why_left_to_torch(17, activation)
    assert f"fewer than {enough} rows" in why_left_to_torch(enough - 1, activation)
    assert why_left_to_torch(enough, activation) is None
    assert why_left_to_torch(17, activation, torch.bfloat16) is None


def test_plain_products_in_float32_are_left_to_torch_but_for_few_rows():
    assert why_left_to_torch(16, "none") is None
    assert why_left_to_torch(1, "none", C=512, F=4096) is None
    assert "plain product" in why_left_to_torch(17, "none")
    assert "plain product" in why_left_to_torch(1, "none", transposed=True)


@pytest.mark.skipif(_extension.missing is not None, reason=str(_extension.missing))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_does_not_depend_on_those_beside_it(dtype):
    """Of up to 16 rows, whose sums have one order."""
    x, weight, bias = draw(16, 70).to(dtype), draw(131, 70).to(dtype), draw(131).to(dtype)
    with backend(linear="cpu"):
        together = OPERATORS.linear_fwd(x, weight, bias, None, "silu", False)[0]
        for row in range(16):
            alone = OPERATORS.linear_fwd(x[row], weight, bias, None, "silu", False)[0]
            assert torch.equal(alone, together[row])
