"""The rate of matrix products of this machine, measured: the ceiling against which a training step is judged.

A table of processors would be wrong for half of them (clock, cores lent by a container, a library without the right
instructions); a third of a second of products is not.
"""

from __future__ import annotations

import statistics
import time

import torch

_SIZES = (256, 512, 1024, 2048, 4096, 8192)
_CALL_S = 0.02  # products that take longer were not faster on any machine tried
_BUDGET_S = 0.3


def measure(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """Return the FLOP/s of square (M, M) @ (M, M) products of `dtype` on `device`, 2 M**3 FLOP each, in about 0.3 s.

    M grows until one product takes 20 ms; the result is the median of the products of that size, all threads in use.
    float32 products use whatever torch.get_float32_matmul_precision() allows, as training does.
    """
    device = torch.device(device)
    started = time.perf_counter()
    size, duration_s = 0, 0.0
    for size in _SIZES:
        a = torch.full((size, size), 0.5, dtype=dtype, device=device)
        b = torch.full((size, size), 0.25, dtype=dtype, device=device)
        _product_s(a, b)  # the first of a size pays for workspaces and code choice
        duration_s = _product_s(a, b)
        if duration_s >= _CALL_S:
            break
    durations = [duration_s]
    while len(durations) < 3 or time.perf_counter() - started < _BUDGET_S:
        durations.append(_product_s(a, b))
    return 2 * size**3 / statistics.median(durations)


def _product_s(a: torch.Tensor, b: torch.Tensor) -> float:
    started = time.perf_counter()
    torch.mm(a, b)
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - started
