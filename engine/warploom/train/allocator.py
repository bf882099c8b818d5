"""What becomes of memory that tensors have freed: it is kept, instead of faulted in again, or given back.

PyTorch's CPU allocator asks malloc for every tensor, and glibc maps blocks of over 128 KB anew each time: a training
step then takes tens of thousands of page faults, each zeroing 4 KB that the step is about to overwrite. The compiled
extension has an arena for large tensors instead (csrc/common/arena.h); without it, malloc can be told to keep blocks,
though small ones among the large leave it with holes.
"""

from __future__ import annotations

import ctypes

import torch

from warploom.ops import _extension

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 64 << 20  # the heap grows by this much at a time


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed tensors for new ones: by the arena, else by settings of malloc, which
    stay until the process ends.

    Returns False where there is neither: no compiled extension, and a malloc that is not glibc's.
    """
    if _extension.why_missing("arena_install") is None and torch.ops.warploom_cpu.arena_install():
        return True
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return all([mallopt(name, value) for name, value in settings])


def release_freed_memory() -> None:
    """Give free memory back to the system now, so that what is resident is what is in use. Of malloc's, only with
    glibc."""
    if _extension.why_missing("arena_give_back") is None:
        torch.ops.warploom_cpu.arena_give_back()
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
