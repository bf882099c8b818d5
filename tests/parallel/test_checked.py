"""Checked mode: two processes that call different collectives both get an error that names both sides, none hangs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = r"parallel/checked_run\.py:\d+"

# What rank 0 calls, and what rank 1 does.
CALLS = {
    "shape": (r"all_reduce SUM float32 \(2,\)", r"all_reduce SUM float32 \(3,\)"),
    "dtype": (r"all_reduce SUM float32 \(2,\)", r"all_reduce SUM int64 \(2,\)"),
    "reduction": (r"all_reduce SUM float32 \(2,\)", r"all_reduce MAX float32 \(2,\)"),
    "operation": (r"all_reduce SUM float32 \(2,\)", r"broadcast root 0 float32 \(2,\)"),
    "root": (r"broadcast root 0 float32 \(2,\)", r"broadcast root 1 float32 \(2,\)"),
    "order": (r"all_reduce SUM float32 \(2,\)", r"all_reduce SUM float32 \(3,\)"),
    "groups": (r"all_reduce SUM float32 \(2,\)", r"all_reduce SUM float32 \(2,\)"),
    "splits": ("all_to_all_single float32", "all_to_all_single float32"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checked")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(str(Path(__file__).with_name("checked_run.py")), str(folder)),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("engine", "kernels", "."))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("mistake", CALLS)
def test_both_sides_are_named_on_both_sides(mistake, results):
    for rank, result in enumerate(results):
        mine, theirs = CALLS[mistake][rank], CALLS[mistake][1 - rank]
        said = result["errors"][mistake]
        assert re.search(rf"rank {rank} calls {mine} at {HERE}.* and rank {1 - rank} calls {theirs} at {HERE}", said), (
            said
        )


def test_rows_that_are_sent_and_not_expected_are_named(results):
    first, second = (result["errors"]["splits"] for result in results)
    assert "sends 2 rows to rank 1 and expects 2, and rank 1" in first
    assert first.endswith("sends 3 rows to rank 0 and expects 2")
    assert "sends 3 rows to rank 0 and expects 2, and rank 0" in second


def test_of_a_message_that_does_not_fit_the_later_side_is_told(results):
    assert results[0]["errors"]["message"] is None
    assert re.search(
        rf"rank 1 calls recv float32 \(4,\) at {HERE}, and rank 0 calls send float32 \(3,\) at {HERE}",
        results[1]["errors"]["message"],
    )


def test_training_that_is_right_passes_in_every_dimension_with_the_same_losses(results):
    for result in results:
        assert len(result["equal"]) == 5 and all(result["equal"].values()), result["equal"]
