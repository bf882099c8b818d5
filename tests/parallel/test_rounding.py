"""How far rounding alone takes two trainings of one process apart, where float32 parity allows 1e-5: the rows of each
batch at once or one by one, or weights that begin one rounding apart. With a smooth activation: at a ReLU whose sum is
zero up to rounding the two go separate ways. What becomes of a difference is then the optimizer's."""

import pytest
from tests.parallel.parity_run import alone

ONE_BY_ONE = {"rows": 1}
NUDGED = {"nudge": 1e-7}


def difference(change, **case):
    """The largest difference of a weight after 20 steps, relative to the largest of its matrix."""
    case["model"] = {"activation": "gelu_tanh"}
    (_, usual), (_, other) = alone(case), alone({**case, **change})
    return max(((usual[n] - other[n]).abs().max() / usual[n].abs().max()).item() for n in usual)


@pytest.mark.slow
def test_it_stays_below_what_parity_allows():
    assert difference(ONE_BY_ONE, dtype="float32", eps=1e-4) < 1e-5


@pytest.mark.slow
def test_it_is_rounding_and_no_error_of_the_method():
    # With 29 bits more it is as much smaller.
    assert 0 < difference(ONE_BY_ONE, dtype="float64", eps=1e-8) < 1e-11


@pytest.mark.slow
def test_a_rate_that_is_too_large_amplifies_it():
    steps = {"dtype": "float32", "optimizer": "sgd"}
    assert difference(NUDGED, lr=0.5, **steps) > 1e-3
    assert difference(NUDGED, lr=0.05, **steps) < 2e-6
