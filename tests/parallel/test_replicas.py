"""Gradients of replicas, summed in buckets during the last backward pass, are those of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Bytes of a bucket, and how many are on their way before the pass ends. A matrix has 256; the parameter without a
# gradient is in the last bucket, which therefore waits for the end.
EARLY = {"each alone": (256, 6), "pairs": (600, 2), "all in one": (1 << 20, 0)}


@pytest.fixture(scope="module")
def ends():
    jobs = {name: ["run", {"bucket_bytes": size, "early": early}] for name, (size, early) in EARLY.items()}
    path = os.pathsep.join(str(ROOT / part) for part in ("engine", "kernels", "."))
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.replicas_run", json.dumps(jobs)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", EARLY)
def test_sums_are_those_of_one_process(ends, name):
    assert ends[name]["codes"] == [0, 0, 0], ends[name]["errors"]
