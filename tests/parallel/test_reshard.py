"""What any of 8 layouts saved, any of 8 loads: weights, optimizer state and random states are the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_what_one_layout_saved_another_loads_bit_for_bit(tmp_path):
    path = os.pathsep.join(str(ROOT / part) for part in ("engine", "kernels"))
    run = str(Path(__file__).with_name("reshard_run.py"))
    done = subprocess.run(
        [*(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"), run, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(4):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        assert result["wrong"][:5] == [] and result["compared"] > 600
