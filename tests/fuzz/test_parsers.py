"""Parsers under inputs that are nearly right: each is taken, and then holds what was promised, or refused by the
parser's own error. No crash, no hang, no memory without bound."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("count", [2_000, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])])
def test_parsers_take_or_refuse(count, capsys):
    path = os.pathsep.join(str(ROOT / part) for part in ("engine", "kernels", "."))
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.parsers", str(count), "0"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    if count > 10_000:
        with capsys.disabled():
            print("".join(f"\n{name}: {seen:,} inputs, {taken:,} taken" for name, (seen, taken) in found.items()))
    assert sum(seen for seen, _ in found.values()) == count
    for seen, taken in found.values():
        assert 0 < taken < seen  # neither all alike
