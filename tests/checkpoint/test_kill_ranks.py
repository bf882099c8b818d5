"""SIGKILL of one process, or of all, while several save: what a fresh start finds is of one step, whole."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(**jobs):
    path = os.pathsep.join(str(ROOT / part) for part in ("engine", "kernels", "."))
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.killed_ranks", json.dumps(jobs)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=590,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(result, at_least):
    """Nothing lost, torn or partial; every kill met its process; both the old and the new were found."""
    assert result["control"] == "new"
    outcomes = collections.Counter(outcome for _, outcome, _ in result["trials"])
    assert set(outcomes) == {"old", "new"}, result["trials"]
    assert all(killed for *_, killed in result["trials"]) and len(result["trials"]) >= at_least


@pytest.fixture(scope="module")
def quick():
    """Each of two processes killed at 12 of its calls, and what the planted bugs lead to."""
    return run(
        sound=["kill_at_calls", {"action": "save_over_ranks", "size": 2, "per_rank": 12}],
        **{
            bug: ["kill_at_calls", {"action": bug, "size": 2, "per_rank": 4}]
            for bug in ("save_in_place", "overwrite", "commit_on_promises")
        },
    )


def test_each_process_killed_at_its_calls_leaves_one_step_whole(quick):
    check(quick["sound"], at_least=24)


@pytest.mark.parametrize("bug", ["save_in_place", "overwrite", "commit_on_promises"])
def test_planted_bugs_leave_what_is_not_whole_and_it_is_known(quick, bug):
    assert quick[bug]["control"] == "new"  # they work, as long as nobody dies
    outcomes = {outcome for _, outcome, _ in quick[bug]["trials"]}
    assert "partial" in outcomes and "torn" not in outcomes  # checksums show what the protocol lets through


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_killed_at_every_call(size):
    result = run(every=["kill_at_calls", {"action": "save_over_ranks", "size": size, "per_rank": 0}])["every"]
    check(result, at_least=2 * sum(result["calls"]))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "count"), [(2, 100), (4, 50)])
def test_random_kills_lose_nothing(size, count):
    result = run(random=["kill_at_random_times", {"size": size, "count": count, "seed": 3}])["random"]
    assert result["control"] == "new"
    outcomes = collections.Counter(outcome for outcome, _ in result["trials"])
    assert set(outcomes) <= {"old", "new"}, outcomes
    assert sum(killed > 0 for _, killed in result["trials"]) >= count and outcomes["old"] >= count // 4
