"""bench.optim: what it times is right, and what is wrong is not timed."""

import pytest
from bench import optim as bench_optim

from warploom.optim import AdamW


@pytest.fixture(autouse=True)
def short_ceiling(monkeypatch):
    ceiling = bench_optim.copy_ceiling
    monkeypatch.setattr(bench_optim, "copy_ceiling", lambda: ceiling(size_bytes=1 << 16))


@pytest.mark.parametrize("clip", [False, True])
def test_records(clip):
    records = bench_optim.bench("tiny", clip, budget_s=0.01)
    assert [record["subject"] for record in records] == ["warploom", "torch"]
    for record in records:
        assert record["ms"] > 0 and record["share_of_ceiling"] > 0 and record["parameters"] > 1e5
    assert records[1]["ratio"] == 1.0


def test_a_wrong_step_is_not_timed(monkeypatch):
    class Wrong(AdamW):
        def step(self, closure=None, *, grad_factor=1.0):
            return super().step(closure, grad_factor=-grad_factor)

    monkeypatch.setattr(bench_optim, "AdamW", Wrong)
    with pytest.raises(SystemExit, match="tiny is wrong, so nothing is timed"):
        bench_optim.bench("tiny", False, budget_s=0.01)
