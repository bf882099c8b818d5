"""What malloc does with memory that tensors have freed: keep it, instead of faulting it in again, or give it back.

PyTorch's CPU allocator asks malloc for every tensor, and glibc maps blocks of over 128 KB anew each time: a training
step then takes tens of thousands of page faults, each zeroing 4 KB that the step is about to overwrite.
"""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 64 << 20  # the heap grows by this much at a time


def keep_freed_memory() -> bool:
    """Tell malloc to serve all sizes from a heap that never shrinks, for the rest of this process.

    Returns False where malloc is not glibc's and takes no such settings.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return all([mallopt(name, value) for name, value in settings])


def release_freed_memory() -> None:
    """Give free memory back to the system now, so that what is resident is what is in use. Nothing without glibc."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
