"""The arena as torch's CPU allocator: what it hands out, what it keeps, what it gives back, and that nothing overlaps.

That training steps take no page faults with it is in tests/train/test_allocator.py.
"""

import mmap
import os
import random
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from warploom.ops import _extension

if reason := _extension.why_missing("arena_install"):
    pytest.skip(reason, allow_module_level=True)

CPU = torch.ops.warploom_cpu
LEAST = 64 << 10  # kArenaLeastBytes of csrc/common/arena.h
MB = 1 << 20


@pytest.fixture(autouse=True)
def installed():
    assert CPU.arena_install()
    yield
    CPU.arena_uninstall()
    CPU.arena_give_back()


def empty(num_bytes):
    return torch.empty(num_bytes, dtype=torch.uint8)


def in_use():
    return CPU.arena_statistics()["in_use_bytes"]


def mapped():
    return CPU.arena_statistics()["mapped_bytes"]


def pages(num_bytes):
    """The size of a block, which is in whole pages."""
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def run_script(script, *arguments):
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("num_bytes", [LEAST, LEAST + 1, 100_000, MB, 2 * MB - 1, 2 * MB, 5 * MB + 12_345])
def test_large_blocks_are_aligned_and_counted_exactly(num_bytes):
    before = CPU.arena_statistics()
    block = empty(num_bytes)
    now = CPU.arena_statistics()
    assert block.data_ptr() % mmap.PAGESIZE == 0
    assert now["blocks"] == before["blocks"] + 1
    assert now["in_use_bytes"] == before["in_use_bytes"] + pages(num_bytes) <= now["peak_bytes"]
    del block
    assert CPU.arena_statistics() == {**now, "blocks": before["blocks"], "in_use_bytes": before["in_use_bytes"]}


def test_small_and_empty_blocks_are_not_the_arenas():
    before = CPU.arena_statistics()
    held = [empty(size) for size in (0, 1, 63, 4096, LEAST - 1)]
    assert all(block.data_ptr() % 64 == 0 for block in held)
    assert CPU.arena_statistics() == before


def test_what_is_freed_is_handed_out_again():
    first = empty(3 * MB)
    address = first.data_ptr()
    del first
    size = mapped()
    again = empty(3 * MB)
    assert again.data_ptr() == address and mapped() == size


def test_free_neighbours_become_one_block_in_every_order():
    for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1)):
        CPU.arena_give_back()
        parts = [empty(MB) for _ in range(3)]
        guard = empty(MB)
        addresses = sorted(part.data_ptr() for part in parts)
        assert [b - a for a, b in zip(addresses, addresses[1:], strict=False)] == [MB, MB]
        for index in order:
            parts[index] = None
        size = mapped()
        whole = empty(3 * MB)
        assert whole.data_ptr() == addresses[0] and mapped() == size
        del whole, guard


def test_the_smallest_hole_that_fits_is_taken():
    parts = [empty(size) for size in (4 * MB, MB, 2 * MB, MB, 3 * MB, MB)]
    holes = {size: parts[index].data_ptr() for size, index in ((4, 0), (2, 2), (3, 4))}
    for index in (0, 2, 4):
        parts[index] = None
    assert empty(2 * MB).data_ptr() == holes[2]
    held = [empty(2 * MB), empty(2 * MB)]
    assert held[0].data_ptr() == holes[2] and held[1].data_ptr() == holes[3]


@given(
    st.lists(
        st.one_of(st.integers(0, 40), st.tuples(st.integers(LEAST, 3 * MB), st.booleans())), min_size=1, max_size=60
    )
)
def test_blocks_never_overlap_and_add_up(actions):
    """A number frees that block of those alive, a size allocates one; each is full of its own value all its life."""
    start = in_use()
    alive = []
    for value, action in enumerate(actions):
        if isinstance(action, tuple):
            size, is_odd = action
            alive.append((value, empty(size | 1 if is_odd else size).fill_(value)))
        elif alive:
            value, block = alive.pop(action % len(alive))
            assert bool((block == value).all())
            del block
        spans = sorted((block.data_ptr(), block.data_ptr() + pages(len(block))) for _, block in alive)
        assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
        assert in_use() == start + sum(pages(len(block)) for _, block in alive) <= mapped()
    assert all(bool((block == value).all()) for value, block in alive)
    alive.clear()
    assert in_use() == start


def test_threads_share_the_arena():
    """Each thread makes lists of blocks, 32 in one call without the interpreter's lock, and frees those it finds in the
    pool, from whichever thread they are, after a look whether they were left alone."""
    start = in_use()
    seeds = [torch.zeros(LEAST // 4 + 1000 * index) for index in range(32)]
    pool, wrong = [], []

    def intact(value, blocks):
        return all(bool((block == value).all()) for block in blocks)

    def work(number):
        chance = random.Random(number)
        for _ in range(60):
            value = chance.randrange(1000)
            pool.append((value, torch._foreach_add(seeds, value)))
            if len(pool) > 6:
                value, blocks = pool.pop(chance.randrange(3))
                if not intact(value, blocks):
                    wrong.append(value)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(pool) <= 6 + 4 and all(intact(*made) for made in pool)
    pool.clear()
    seeds.clear()
    assert in_use() == start


def test_tensors_outlive_install_and_uninstall():
    CPU.arena_uninstall()
    start = CPU.arena_statistics()
    before = torch.full((MB,), 1.0)
    assert CPU.arena_statistics() == start
    assert CPU.arena_install() and CPU.arena_install()
    during = torch.full((MB,), 2.0)
    assert in_use() == start["in_use_bytes"] + 4 * MB
    CPU.arena_uninstall()
    CPU.arena_uninstall()
    after = torch.full((MB,), 3.0)
    assert CPU.arena_give_back() >= 0 and in_use() == start["in_use_bytes"] + 4 * MB
    for tensor, value in ((before, 1.0), (during, 2.0), (after, 3.0)):
        tensor.resize_(2 * MB)
        assert bool((tensor[:MB] == value).all())
    del before, during, after
    assert in_use() == start["in_use_bytes"]


def test_a_profile_of_memory_sees_the_blocks():
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as taken:
        block = empty(5 * MB)
        del block
    usage = {event.key: event.self_cpu_memory_usage for event in taken.key_averages()}
    assert usage["aten::empty"] == 5 * MB
    assert usage["[memory]"] == -5 * MB


GIVE_BACK = """
import torch, warploom.ops
CPU = torch.ops.warploom_cpu
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
CPU.arena_install()
kept = torch.ones(5 << 18)
start = resident()
blocks = [torch.ones(5 << 18) for _ in range(40)]
used = resident() - start
del blocks
freed = resident() - start
given = CPU.arena_give_back() >> 20
print(used, freed, resident() - start, given, CPU.arena_statistics()["mapped_bytes"] >> 20, int(kept.sum()) == 5 << 18)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read as Linux tells it")
def test_free_memory_is_kept_until_it_is_given_back():
    used, freed, left, given, still_mapped, intact = run_script(GIVE_BACK)
    assert int(used) >= 190 and int(freed) >= 190 and int(left) <= 10
    assert 200 <= int(given) < 204 and int(still_mapped) == 5 and intact == "True"


@pytest.mark.parametrize("num_bytes", [1 << 45, 1 << 50, 1 << 62])
def test_too_much_is_refused_in_torchs_words(num_bytes):
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator: can't allocate memory: you tried to allocate"):
        empty(num_bytes)
    assert bool((empty(MB).fill_(3) == 3).all())


UNDER_A_LIMIT = """
import resource, torch, warploom.ops
torch.ops.warploom_cpu.arena_install()
MB = 1 << 20
def empty(megabytes):
    return torch.empty(megabytes * MB, dtype=torch.uint8).fill_(1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 600 * MB,) * 2)
parts = [empty(50) for _ in range(10)]
del parts[::2]
try:
    empty(300)
    print("room")
except RuntimeError as error:
    print("refused", "DefaultCPUAllocator" in str(error))
del parts
print(len(empty(500)) // MB)
holes = [empty(100) for _ in range(5)][1::2]
print(len(empty(300)) // MB)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on address space is Linux's")
def test_free_memory_is_given_back_before_a_refusal():
    """500 of 600 MB in use, every second block of 50 freed: 300 MB fit only once the 250 free ones are given back."""
    assert run_script(UNDER_A_LIMIT) == ["room", "500", "300"]


FORK = """
import os, sys, threading, warnings
import torch, warploom.ops
warnings.simplefilter("ignore", DeprecationWarning)  # of forks with threads: that is the point here
torch.ops.warploom_cpu.arena_install()
kept = torch.full((1 << 15,), 5.0)
done = threading.Event()
def allocate():
    while not done.is_set():
        torch.empty(1 << 20)
sys.setswitchinterval(1e-4)
thread = threading.Thread(target=allocate)
thread.start()
codes = []
for _ in range(100):
    child = os.fork()
    if child == 0:
        block = torch.full((1 << 15,), 6.0)
        ok = bool((kept == 5).all()) and bool((block == 6).all())
        del block
        os._exit(0 if ok else 1)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
done.set()
thread.join()
print(set(codes))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_finds_the_arena_unlocked():
    """While another thread allocates; a child that waits for a lock nobody will open runs into the timeout."""
    assert run_script(FORK) == ["{0}"]


class _Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.full((LEAST,), float(index))


def test_data_loader_workers_use_the_arena():
    loader = torch.utils.data.DataLoader(_Rows(), batch_size=2, num_workers=2)
    batches = list(loader)
    assert [batch[:, 0].tolist() for batch in batches] == [[0.0, 1.0], [2.0, 3.0]]
