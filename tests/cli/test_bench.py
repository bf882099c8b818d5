"""`warploom bench`: the benches run, write what they promise, and refuse to time what is wrong."""

import json
import time

import pytest
from bench import ops as bench_ops
from bench.harness import interleave

from warploom.cli import bench
from warploom.cli.main import main
from warploom.ops import REGISTRY


def test_records(tmp_path):
    path = tmp_path / "ops.json"
    assert main(["bench", "ops", "--only", "rotary", "--dtype", "fp32", "--budget-s", "0.05", "--json", str(path)]) == 0
    records = json.loads(path.read_text())
    cases = {case.name for case in REGISTRY["rotary"].bench_cases}
    assert {(r["shape"], r["direction"], r["subject"]) for r in records} == {
        (case, direction, subject)
        for case in cases
        for direction in ("forward", "backward")
        for subject in ("warploom", "torch")
    }
    for record in records:
        assert record["bench"] == "ops" and record["op"] == "rotary" and record["dtype"] == "fp32"
        assert record["ms"] > 0 and record["ratio"] > 0 and record["share_of_ceiling"] > 0
        assert record["machine"]["torch"]


def test_an_unknown_op_is_named(capfd):
    assert main(["bench", "ops", "--only", "rotery"]) == 2
    assert "did you mean 'rotary'" in capfd.readouterr().err


def test_outside_a_checkout(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "CHECKOUT", tmp_path)
    assert main(["bench"]) == 2
    assert "part of the source checkout" in capsys.readouterr().err


def test_a_wrong_op_is_not_timed(monkeypatch):
    op = REGISTRY["rotary"]
    next(bench_ops.passes(op, op.bench_cases[0], bench_ops.DTYPES["fp32"]))
    monkeypatch.setattr(op, "function", lambda x, **arguments: op.reference(x, **arguments) * 1.001)
    with pytest.raises(SystemExit, match="rotary .* is wrong, so nothing is timed: output 0: max error"):
        next(bench_ops.passes(op, op.bench_cases[0], bench_ops.DTYPES["fp32"]))


def test_subjects_take_turns():
    order = []
    # Long enough that a sample is one call.
    subjects = {name: lambda name=name: (order.append(name), time.sleep(0.003)) for name in "abc"}
    timings = interleave(subjects, warmup_s=0.0, budget_s=0.0, min_rounds=4)
    assert all(len(timing.samples_s) == 4 for timing in timings.values())
    # Each subject is called twice or more to warm up; then come four rounds, each in an order of its own.
    rounds = ["".join(order[i : i + 3]) for i in range(len(order) - 12, len(order), 3)]
    assert all(sorted(turn) == list("abc") for turn in rounds) and len(set(rounds)) > 1
