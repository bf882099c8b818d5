"""Check the kernels of the named ops at the level WARPLOOM_CPU_LEVEL against the ops' float64 references.

Run by test_levels.py in a process of its own, since a process keeps the level it first chose.
"""

from __future__ import annotations

import os
import sys

import torch

from warploom.ops import REGISTRY, _extension, backend
from warploom.ops._accuracy import Trial
from warploom.ops._op import BackendUnavailable, Case, Op


def main(names: list[str]) -> None:
    assert _extension.level() == os.environ["WARPLOOM_CPU_LEVEL"]
    for op in map(REGISTRY.__getitem__, names):
        refused = 0
        for case in op.cases:
            try:
                check(op, case)
            except BackendUnavailable:
                refused += 1
        assert refused < len(op.cases) / 2, f"{op.name} refuses {refused} of {len(op.cases)} cases"
        assert set(op.calls) == {f"{suffix}/cpu" for suffix in op.schemas}, f"{op.name} ran {dict(op.calls)}"


def check(op: Op, case: Case) -> None:
    for dtype in case.dtypes:
        trial = Trial(op, case, dtype)
        with backend("cpu"):
            wrong = [str(d) for d in trial.deviations(trial.evaluate(op.function)) if not d.acceptable]
        assert not wrong, f"{op.name} {case.name} {dtype}: {'; '.join(wrong)}"
    # In float64 both sides round alike; what is left is the order of the sums.
    trial = Trial(op, case, torch.float64)
    with backend("cpu"):
        results = trial.evaluate(op.function)
    for name, truth in trial.truth.items():
        torch.testing.assert_close(results[name], truth, rtol=1e-9, atol=1e-10, msg=f"{op.name} {case.name} {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
