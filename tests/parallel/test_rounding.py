"""Why float32 parity asks for a larger eps of AdamW: one process, no parallelism, the rows of each batch taken at once
or one by one. Both make the same sums in another order, so they differ by rounding alone; what becomes of it is the
optimizer's."""

import pytest
from tests.parallel.parity_run import alone


def difference(**case):
    """The largest difference of a weight after 20 steps, relative to the largest of its matrix."""
    (_, at_once), (_, one_by_one) = alone(case), alone({**case, "rows": 1})
    return max(((at_once[n] - one_by_one[n]).abs().max() / at_once[n].abs().max()).item() for n in at_once)


@pytest.mark.slow
def test_adam_amplifies_rounding_where_eps_is_small():
    amplified = difference(dtype="float32", eps=1e-8)
    bounded = difference(dtype="float32", eps=1e-4)
    passed_on = difference(dtype="float32", optimizer="sgd")
    assert amplified > 1e-5 > 3 * bounded
    assert passed_on < 1e-5
    # It is rounding, not an error of the method: with 29 bits more it is as much smaller.
    assert difference(dtype="float64", eps=1e-8) < 1e-11
