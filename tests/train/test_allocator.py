"""malloc keeps what tensors have freed: a second round of the same tensors takes no page faults."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from warploom.train.allocator import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    print("no mallopt")
    sys.exit()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (1 << 18, 1 << 24, 3 << 22, 1 << 25):
        torch.ones(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted as Linux counts them")
def test_the_same_tensors_again_take_no_page_faults():
    def run(mode):
        done = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    kept = run("keep")
    if kept == "no mallopt":
        pytest.skip("malloc is not glibc's here")
    # Without it: 252 MB of tensors in pages of 4 KB, or fewer where the kernel gives huge ones.
    assert int(kept) < 20 < int(run("as it is"))
