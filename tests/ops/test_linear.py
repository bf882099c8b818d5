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


@pytest.mark.parametrize(("activation", "enough"), [("gelu", 32), ("silu", 32), ("relu", 256), ("relu2", 256)])
def test_few_rows_in_float32_are_left_to_torch(activation, enough):
    """Sampling reads a row at a time, and a weight that is packed for each is read three times."""

    def why(rows, dtype):
        return (
            REGISTRY["linear"]
            .backends["cpu"]
            .slower["fwd"](draw(rows, 8).to(dtype), draw(16, 8), None, None, activation, False)
        )

    assert f"fewer than {enough} rows" in why(enough - 1, torch.float32)
    assert why(enough, torch.float32) is None
    assert why(1, torch.bfloat16) is None
