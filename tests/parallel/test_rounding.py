"""Why float32 parity asks for a larger eps of AdamW and for a small rate of plain steps: one process, no parallelism,
with the rows of each batch taken at once or one by one, or with weights that begin one rounding apart. What becomes of
such a difference is the optimizer's."""

import pytest
from tests.parallel.parity_run import alone

ONE_BY_ONE = {"rows": 1}
NUDGED = {"nudge": 1e-7}


def difference(change, **case):
    """The largest difference of a weight after 20 steps, relative to the largest of its matrix."""
    (_, usual), (_, other) = alone(case), alone({**case, **change})
    return max(((usual[n] - other[n]).abs().max() / usual[n].abs().max()).item() for n in usual)


@pytest.mark.slow
def test_adam_amplifies_rounding_where_eps_is_small():
    amplified = difference(ONE_BY_ONE, dtype="float32", eps=1e-8)
    bounded = difference(ONE_BY_ONE, dtype="float32", eps=1e-4)
    passed_on = difference(ONE_BY_ONE, dtype="float32", optimizer="sgd")
    assert amplified > 1e-5 > 3 * bounded
    assert passed_on < 1e-5
    # It is rounding, not an error of the method: with 29 bits more it is as much smaller.
    assert difference(ONE_BY_ONE, dtype="float64", eps=1e-8) < 1e-11


@pytest.mark.slow
def test_a_large_rate_amplifies_it_too():
    steps = {"optimizer": "sgd", "model": {"activation": "gelu_tanh"}}
    assert difference(NUDGED, dtype="float32", lr=0.5, **steps) > 1e-3
    assert difference(NUDGED, dtype="float32", lr=0.05, **steps) < 1e-6
    assert difference({"nudge": 1e-14}, dtype="float64", lr=0.05, **steps) < 1e-13
