"""Run by test_levels.py in a process of its own, since a process keeps the level it first chose: every kernel of every
op with a C++ back end, at the level WARPLOOM_CPU_LEVEL, against the op's float64 reference. Prints what it checked."""

from __future__ import annotations

import os

import torch

from warploom.ops import REGISTRY, _extension, backend
from warploom.ops._accuracy import Trial


def main() -> None:
    assert _extension.level() == os.environ["WARPLOOM_CPU_LEVEL"]
    for op in REGISTRY.values():
        if "cpu" not in op.backends:
            continue
        for case in op.cases:
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
                torch.testing.assert_close(
                    results[name], truth, rtol=1e-9, atol=1e-10, msg=f"{op.name} {case.name} {name}"
                )
        assert set(op.calls) == {f"{suffix}/cpu" for suffix in op.schemas}, f"{op.name} ran {dict(op.calls)}"
        print(op.name)


if __name__ == "__main__":
    main()
