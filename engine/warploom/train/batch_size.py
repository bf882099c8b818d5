"""The largest micro batch that memory holds, found by running training steps of growing size.

On a GPU a step that does not fit raises, so sizes are simply tried. On a CPU it would wake the out-of-memory killer, so
there the growth from small steps is measured and the rest is reckoned.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from warploom.errors import UserError
from warploom.train.allocator import release_freed_memory

# The rest is for checkpoints, evaluation and whoever else uses the machine.
_USABLE = 0.7
_CLEAR_GROWTH_BYTES = 64 << 20  # less may be an allocator that fills its own holes
_SAMPLE_EVERY_S = 0.001


def find_micro_batch_size(
    run_step: Callable[[int], None], global_batch_size: int, device: torch.device, *, reserve_bytes: int
) -> int:
    """Return the largest divisor of global_batch_size whose forward and backward pass fits.

    run_step(size) makes such a pass over size sequences; gradients must be allocated already. reserve_bytes are kept
    free: what training will allocate later, optimizer state above all. Raises UserError if not even one fits a GPU.
    """
    sizes = [size for size in range(1, global_batch_size + 1) if global_batch_size % size == 0]
    if device.type == "cuda":
        return _by_trial(run_step, sizes, device, reserve_bytes)
    return _by_growth(run_step, sizes, _USABLE * available_bytes() - reserve_bytes)


def _by_trial(run_step: Callable[[int], None], sizes: list[int], device: torch.device, reserve_bytes: int) -> int:
    largest = _largest_without_error(run_step, sizes, device, reserve_bytes)
    gc.collect()  # the failed step's frames held its activations
    torch.cuda.empty_cache()
    if not largest:
        raise UserError(
            f"one sequence does not fit the memory of {torch.cuda.get_device_name(device)}; give a smaller model, a "
            "smaller train.seq_len or train.grad_checkpointing"
        )
    return largest


def _largest_without_error(
    run_step: Callable[[int], None], sizes: list[int], device: torch.device, reserve_bytes: int
) -> int:
    largest = 0
    try:
        _reserve = torch.empty(reserve_bytes, dtype=torch.uint8, device=device)
        for size in sizes:
            run_step(size)
            largest = size
    except torch.OutOfMemoryError:
        pass
    return largest


def _by_growth(run_step: Callable[[int], None], sizes: list[int], room_bytes: float) -> int:
    release_freed_memory()  # a step that fits into holes would seem to need nothing
    before = _rss_bytes()
    run_step(sizes[0])  # workspaces are allocated once, whatever the size
    first = peak = _peak_rss_bytes(run_step, sizes[0])
    measured = sizes[0]
    for size in sizes[1:]:
        # As if all of it grew with the batch: too much, so what is tried here is safe.
        at_most = size * (peak - before) / measured
        if peak - first >= _CLEAR_GROWTH_BYTES or at_most > room_bytes:
            break
        peak, measured = _peak_rss_bytes(run_step, size), size
    if peak - first >= _CLEAR_GROWTH_BYTES:
        per_sequence = (peak - first) / (measured - sizes[0])
    else:
        per_sequence = (peak - before) / measured
    return max(size for size in sizes if size <= measured or size * per_sequence <= room_bytes)


def _rss_bytes() -> int:
    return psutil.Process().memory_info().rss


def _peak_rss_bytes(run_step: Callable[[int], None], size: int) -> int:
    """The largest resident set during run_step."""
    try:
        _CLEAR_REFS.write_text("5")  # Linux: sets the process's high-water mark to what is resident now
    except OSError:
        return _sampled_peak_rss_bytes(run_step, size)
    run_step(size)
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10  # in kB


_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def _sampled_peak_rss_bytes(run_step: Callable[[int], None], size: int) -> int:
    """The same where the high-water mark never comes down; a spike between two samples is missed."""
    process = psutil.Process()
    peak = 0
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(_SAMPLE_EVERY_S):
            peak = max(peak, process.memory_info().rss)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        run_step(size)
    finally:
        done.set()
        sampler.join()
    return max(peak, process.memory_info().rss)


def available_bytes() -> int:
    """Memory that new allocations of this process can have: the machine's, or less where its control group says so."""
    available = psutil.virtual_memory().available
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except OSError:  # no control groups (of version 2) here
        return available
    return available if limit == "max" else max(0, min(available, int(limit) - used))
