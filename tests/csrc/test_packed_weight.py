"""What is kept of a weight serves forward and backward with the bits of a weight packed at each use, at every level."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from warploom.ops import _extension

pytestmark = pytest.mark.skipif(_extension.missing is not None, reason=str(_extension.missing))

CHECK = """
import itertools, os, sys
import torch
from warploom.ops import _extension

assert _extension.level() == os.environ["WARPLOOM_CPU_LEVEL"]
torch.set_num_threads(2)
ops = torch.ops.warploom_cpu
shapes = [(1, 1), (31, 33), (16, 257), (64, 96), (65, 300), (200, 70), (300, 544)]
for (F, C), dtype, wide in itertools.product(shapes, (torch.bfloat16, torch.float16), (False, True)):
    torch.manual_seed(0)
    weight = torch.randn(F, C, dtype=torch.float32 if wide else dtype)
    x, dy = torch.randn(37, C, dtype=dtype), torch.randn(37, F, dtype=dtype)
    size = ops.linear_packed_bytes(weight, dtype)
    packed = torch.full((size,), 0xFF, dtype=torch.uint8)  # NaN, whatever the kernel takes it for
    ops.linear_pack(weight, dtype, packed)
    nothing = x.new_empty(0)
    for kept, fresh in (
        (ops.linear_fwd(x, weight, None, packed, "none", False), ops.linear_fwd(x, weight, None, None, "none", False)),
        tuple(ops.linear_bwd(dy, x, weight, p, nothing, "none", True, True, True) for p in (packed, None)),
    ):
        for a, b in zip(kept, fresh):
            assert a.isfinite().all() and torch.equal(a, b), (F, C, dtype, wide)
    three = [ops.linear_qkv_bwd(x, [dy] * 3, [weight] * 3, [p] * 3, True, False, False)[0] for p in (packed, None)]
    assert three[0].isfinite().all() and torch.equal(*three), (F, C, dtype, wide)
"""


@pytest.mark.parametrize("level", _extension.usable_levels() if _extension.missing is None else [])
def test_a_kept_weight_has_the_bits_of_one_packed_at_each_use(level):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "WARPLOOM_CPU_LEVEL": level}
    run = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
