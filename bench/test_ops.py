"""The cases of bench.ops as pytest-benchmark tests: python -m pytest bench --benchmark-enable

Without --benchmark-enable each call runs once, as a test that it still works. The table groups what is comparable.
"""

import functools

import pytest

from bench.ops import DTYPES, passes
from warploom.ops import REGISTRY

CASES = [
    pytest.param(op, case, dtype, direction, id=f"{op.name}-{case.name}-{dtype}-{name}")
    for op in REGISTRY.values()
    for case in op.bench_cases[:1]
    for dtype in DTYPES
    for direction, name in enumerate(("forward", "backward") if op.differentiable else ("forward",))
]


@functools.lru_cache(maxsize=1)  # the check before timing is slow, and the tests of a case follow each other
def passes_of(op, case, dtype):
    return list(passes(op, case, DTYPES[dtype]))


@pytest.mark.parametrize("subject", ["warploom", "torch"])
@pytest.mark.parametrize(("op", "case", "dtype", "direction"), CASES)
def test_op(benchmark, op, case, dtype, direction, subject):
    timed = passes_of(op, case, dtype)[direction]
    benchmark.group = f"{op.name} {case.name} {dtype} {timed.direction}"
    benchmark(timed.calls[subject])
