"""The fork server, started once for all checkpoint tests that kill processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def in_forks():
    """Call a scenario of fork_server.py by name and return its answer."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.checkpoint.fork_server"],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(_ROOT / part) for part in ("engine", "kernels", "."))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def call(scenario, **arguments):
        server.stdin.write(json.dumps([scenario, arguments]) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, f"{scenario} died in the fork server; its traceback is on stderr"
        return json.loads(answer)

    yield call
    server.stdin.close()
    server.stdout.close()
    server.wait()
