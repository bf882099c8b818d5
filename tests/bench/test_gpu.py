"""What of bench.gpu runs without a card: its parts fail alone, its budget holds, its exit code tells."""

import json
import time

import pytest
import torch
from bench import gpu


def test_without_a_card_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main([]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err


def test_a_part_that_fails_is_reported_and_the_rest_goes_on(tmp_path, capsys):
    report = gpu.Report(deadline=time.monotonic() + 100)
    row = {"op": "linear", "shape": "8x8", "subject": "triton", "us": 12.5, "share_of_ceiling": 0.5}

    def fails():
        raise RuntimeError("illegal memory access")

    report.part("first", fails)
    report.part("second", lambda: report.rows.append(row))
    path = tmp_path / "gpu.json"
    assert gpu.finish(report, "a card", path) == 1
    said = capsys.readouterr()
    assert "FAILED: first: RuntimeError" in said.err and "illegal memory access" in said.err
    assert "12.5 us" in said.out and "0.50 of ceiling" in said.out
    assert json.loads(path.read_text())["rows"] == [row]


def test_without_failures_it_returns_zero():
    assert gpu.finish(gpu.Report(deadline=0.0), "a card", None) == 0


def test_what_the_budget_does_not_reach_is_named(capsys):
    report = gpu.Report(deadline=time.monotonic() - 1)
    report.part("training step", lambda: pytest.fail("it ran"))
    assert gpu.finish(report, "a card", None) == 0
    assert "no time left for: training step" in capsys.readouterr().out
