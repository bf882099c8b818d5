"""The batch-size finder: measured growth on a CPU, out-of-memory errors on a (pretended) GPU."""

import subprocess
import sys

import pytest
import torch

from warploom.errors import UserError
from warploom.train import batch_size
from warploom.train.batch_size import available_bytes, find_micro_batch_size

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MB = 1 << 20


def memory_hungry(per_sequence_bytes, fixed_bytes=0):
    """A step that holds .needs(size) bytes for a moment; .tried are the sizes it was asked for."""

    def run_step(size):
        run_step.tried.append(size)

    run_step.tried = []
    run_step.needs = lambda size: fixed_bytes + size * per_sequence_bytes
    return run_step


@pytest.fixture
def room(monkeypatch):
    """Set the memory that the finder believes it may use. What a step takes is what it says, since this process, after
    thousands of tests, is full of holes that a step fits into; the real reading is tested in a process of its own."""

    def peak_rss_bytes(run_step, size):
        run_step(size)
        return 1024 * MB + run_step.needs(size)

    def set_room(num_bytes):
        monkeypatch.setattr(batch_size, "available_bytes", lambda: num_bytes / batch_size._USABLE)
        monkeypatch.setattr(batch_size, "_rss_bytes", lambda: 1024 * MB)
        monkeypatch.setattr(batch_size, "_peak_rss_bytes", peak_rss_bytes)

    return set_room


IN_A_PROCESS = """
import torch
from warploom.train import batch_size
batch_size.available_bytes = lambda: 16 * (1 << 30) / batch_size._USABLE
tried = []
def run_step(size):
    tried.append(size)
    torch.ones(size * 40 << 20, dtype=torch.uint8).add_(1)
print(batch_size.find_micro_batch_size(run_step, 1024, torch.device("cpu"), reserve_bytes=0), max(tried))
"""


def test_real_memory_is_measured_in_a_fresh_process():
    done = subprocess.run([sys.executable, "-c", IN_A_PROCESS], capture_output=True, text=True, check=True)
    found, largest_tried = map(int, done.stdout.split())
    assert found == 256 and largest_tried <= 8  # as below, with real tensors


@pytest.mark.parametrize("fixed_bytes", [0, 128 * MB])
def test_the_growth_of_small_steps_is_extrapolated(room, fixed_bytes):
    room(16 * 1024 * MB)
    step = memory_hungry(40 * MB, fixed_bytes)
    found = find_micro_batch_size(step, 1024, CPU, reserve_bytes=0)
    assert found == 256  # 256 * 40 MB are 10 GB; 512 would be 20 GB
    assert max(step.tried) <= 8  # nothing near the limit was tried


def test_the_reserve_is_left_free(room):
    room(16 * 1024 * MB)
    assert find_micro_batch_size(memory_hungry(40 * MB), 1024, CPU, reserve_bytes=9 * 1024 * MB) == 128


def test_steps_that_fit_whole_take_the_global_batch(room):
    room(16 * 1024 * MB)
    step = memory_hungry(1000)
    assert find_micro_batch_size(step, 48, CPU, reserve_bytes=0) == 48


def test_a_step_that_could_be_too_large_is_not_tried(room):
    room(300 * MB)
    step = memory_hungry(100 * MB)
    assert find_micro_batch_size(step, 13, CPU, reserve_bytes=0) == 1  # 13 is prime: the next size is all
    assert step.tried == [1, 1]


def test_available_memory_is_what_the_control_group_leaves(monkeypatch):
    texts = {"/sys/fs/cgroup/memory.max": "1000000\n", "/sys/fs/cgroup/memory.current": "400000\n"}
    monkeypatch.setattr(batch_size.Path, "read_text", lambda path: texts[str(path)])
    assert available_bytes() == 600_000
    texts["/sys/fs/cgroup/memory.max"] = "max\n"
    assert available_bytes() > 10_000_000


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A GPU whose memory runs out where the step says so."""
    reserved = []
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: reserved.append((size, device)))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "pretended GPU")
    return reserved


@pytest.mark.parametrize(("fits", "found"), [(1, 1), (5, 4), (64, 12)])
def test_on_a_gpu_sizes_grow_until_one_does_not_fit(pretended_gpu, fits, found):
    def step(size):
        if size > fits:
            raise torch.OutOfMemoryError(f"size {size}")

    assert find_micro_batch_size(step, 12, GPU, reserve_bytes=77) == found
    assert pretended_gpu == [(77, GPU)]


def test_a_gpu_too_small_for_one_sequence_is_an_error(pretended_gpu):
    def step(size):
        raise torch.OutOfMemoryError

    with pytest.raises(UserError, match="one sequence does not fit the memory of pretended GPU"):
        find_micro_batch_size(step, 12, GPU, reserve_bytes=0)
