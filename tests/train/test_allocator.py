"""Memory of freed tensors is kept: steps of training take no page faults once they have found their memory."""

import functools
import subprocess
import sys

import pytest

from warploom.ops import _extension

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted as Linux counts them")

needs_arena = pytest.mark.skipif(
    _extension.why_missing("arena_install") is not None, reason=str(_extension.why_missing("arena_install"))
)

# Each script is PREPARE and one of those below. Its argument says what becomes of freed memory.
PREPARE = """
import resource, sys
(mode,) = sys.argv[1:]
if mode == "malloc":
    sys.modules["warploom._C"] = None  # makes its import an ImportError
import torch
import warploom.train.trainer  # as in a run: what it imports lies in the same heap
from warploom.train.allocator import keep_freed_memory, release_freed_memory
if mode != "as it is" and not keep_freed_memory():
    print("no mallopt")
    sys.exit()
def faults_of(call):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def resident_mb():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20
"""
TENSORS = """
def tensors():
    for size in (1 << 18, 1 << 24, 3 << 22, 1 << 25):
        torch.ones(size)
tensors()
print(faults_of(tensors), end=" ")
kept = resident_mb()
release_freed_memory()
print(kept - resident_mb())
"""
STEPS = """
import functools
from types import SimpleNamespace
from warploom.models.config import TransformerConfig
from warploom.models.transformer import Transformer
from warploom.nn.linear import keep_packed
from warploom.optim import AdamW
from warploom.train.step import training_step
# Many words: their 38 MB of gradients are more than glibc keeps by itself, 32 MB.
config = TransformerConfig(vocab_size=24576, max_seq_len=64, d_model=384, num_layers=2, num_heads=6)
for dtype in (torch.float32, torch.bfloat16):
    model = Transformer(config)
    model.compute_dtype = dtype
    keep_packed(model)
    parameters = list(model.parameters())
    optimizers = [AdamW(parameters)]
    def step():
        tokens = torch.randint(config.vocab_size, (2, 65))
        batch = SimpleNamespace(tokens=tokens[:, :-1], targets=tokens[:, 1:])
        loss_sum = functools.partial(model.loss, reduction="sum")
        training_step(loss_sum, [batch], parameters, optimizers, grad_clip=1.0)
    for _ in range(4):
        step()
    print(*(faults_of(step) for _ in range(4)))
"""


@functools.cache
def run(script, mode):
    command = [sys.executable, "-c", PREPARE + script, mode]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if output == "no mallopt":
        pytest.skip("malloc is not glibc's here")
    return [int(number) for number in output.split()]


@pytest.mark.parametrize("mode", [pytest.param("arena", marks=needs_arena), "malloc"])
def test_the_same_tensors_again_take_no_page_faults(mode):
    faults, released_mb = run(TENSORS, mode)
    # Without it: 252 MB of tensors in pages of 4 KB, or fewer where the kernel gives huge ones.
    assert faults < 20 < run(TENSORS, "as it is")[0]
    assert released_mb > 100


@needs_arena
def test_a_training_step_takes_no_page_faults():
    with_arena, as_it_is = run(STEPS, "arena"), run(STEPS, "as it is")
    assert len(with_arena) == 8 and max(with_arena) < 100
    assert sum(as_it_is) > 10 * sum(with_arena)
