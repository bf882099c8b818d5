"""Tile sizes, warps and stages of attention's kernels, by card and kind of call."""

from __future__ import annotations

import torch
from torch import Tensor

from warploom_kernels._launch import INTERPRETER, Config


def _blocks(pairs: list[tuple[int, int, int, int]], *, tma: bool) -> list[Config]:
    """(BLOCK_T, BLOCK_S, warps, stages); with loads by descriptor too, where they are possible."""
    return [
        Config({"BLOCK_T": t, "BLOCK_S": s, "TMA": by_tma}, num_warps=warps, num_stages=stages)
        for by_tma in ((False, True) if tma else (False,))
        for t, s, warps, stages in pairs
    ]


def tile_configs(which: str, arch: int, q: Tensor, common: dict[str, object], tma: bool) -> list[Config]:
    """which: fwd, dq or dkdv."""
    D = q.shape[-1]
    if arch == INTERPRETER:
        return _blocks([(32, 32, 4, 1)], tma=False) if which != "fwd" else _blocks([(32, 16, 4, 1)], tma=False)
    # What is not in the table goes by the nearest below: sm_86 and sm_89 by sm_80, and sm_120, which has sm_80's
    # matrix instructions, too.
    family = 100 if 100 <= arch < 120 else 90 if arch == 90 else 80
    many = any(common[name] is not None for name in ("bias", "window", "cu_seqlens"))
    if q.dtype == torch.float32:
        return _blocks([_float32_block(which, family, D, many)], tma=False)
    tma = tma and not (many and which == "dkdv")  # making descriptors for every head takes the registers that are left
    return _blocks(_TABLE[which, family, 64 if D <= 64 else 128 if D <= 128 else 256, many], tma=tma)


def _float32_block(which: str, family: int, D: int, many: bool) -> tuple[int, int, int, int]:
    """Products without tensor cores, which are made of multiply-adds with operands in registers. Where this is not
    16 x 16 with 8 warps, the compiler spilled with that."""
    if D <= 64:
        return 32, 32, 8, 1
    if D > 128 and (which == "fwd" or (which == "dkdv" and family == 90 and not many)):
        return 16, 16, 16, 1
    if D <= 128 and which == "dkdv" and many:
        return 16, 32, 4 if family == 80 else 8, 1
    return 16, 16, 8, 1


# By kernel, architecture, padded head width, and whether there is a bias, a window or documents, which take registers.
# None of them spills (tests/kernels/test_compile.py).
_TABLE = {
    ("fwd", 80, 64, False): [(128, 64, 8, 3), (128, 128, 8, 3), (64, 64, 4, 3)],
    ("fwd", 80, 64, True): [(64, 64, 4, 3), (128, 64, 8, 3)],
    ("fwd", 80, 128, False): [(128, 32, 8, 3)],
    ("fwd", 80, 128, True): [(128, 32, 8, 3)],
    ("fwd", 80, 256, False): [(64, 32, 8, 2)],
    ("fwd", 80, 256, True): [(64, 32, 8, 2)],
    ("fwd", 90, 64, False): [(128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)],
    ("fwd", 90, 64, True): [(128, 64, 8, 3), (64, 64, 4, 3)],
    ("fwd", 90, 128, False): [(128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3)],
    ("fwd", 90, 128, True): [(128, 64, 8, 3)],
    ("fwd", 90, 256, False): [(64, 64, 8, 2)],
    ("fwd", 90, 256, True): [(64, 32, 8, 2)],
    ("fwd", 100, 64, False): [(128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3)],
    ("fwd", 100, 64, True): [(128, 64, 8, 3)],
    ("fwd", 100, 128, False): [(128, 128, 8, 2), (128, 64, 8, 3)],
    ("fwd", 100, 128, True): [(128, 64, 8, 3)],
    ("fwd", 100, 256, False): [(64, 64, 8, 2)],
    ("fwd", 100, 256, True): [(64, 64, 8, 2)],
    ("dq", 80, 64, False): [(128, 64, 8, 2), (64, 64, 4, 3)],
    ("dq", 80, 64, True): [(64, 32, 4, 2)],
    ("dq", 80, 128, False): [(64, 64, 8, 2), (64, 32, 4, 2)],
    ("dq", 80, 128, True): [(64, 64, 8, 2)],
    ("dq", 80, 256, False): [(64, 32, 8, 2)],
    ("dq", 80, 256, True): [(32, 32, 8, 1)],
    ("dq", 90, 64, False): [(128, 64, 8, 2), (64, 64, 4, 3)],
    ("dq", 90, 64, True): [(128, 64, 8, 2), (64, 64, 4, 2)],
    ("dq", 90, 128, False): [(128, 64, 8, 2), (64, 64, 4, 2)],
    ("dq", 90, 128, True): [(128, 64, 8, 2)],
    ("dq", 90, 256, False): [(64, 32, 8, 2)],
    ("dq", 90, 256, True): [(64, 32, 8, 2)],
    ("dq", 100, 64, False): [(128, 64, 8, 2), (64, 64, 4, 3)],
    ("dq", 100, 64, True): [(128, 64, 8, 2)],
    ("dq", 100, 128, False): [(128, 64, 8, 2)],
    ("dq", 100, 128, True): [(128, 64, 8, 2)],
    ("dq", 100, 256, False): [(64, 32, 8, 2)],
    ("dq", 100, 256, True): [(64, 32, 8, 2)],
    ("dkdv", 80, 64, False): [(64, 128, 8, 2), (32, 128, 8, 2)],
    ("dkdv", 80, 64, True): [(16, 64, 8, 1)],
    ("dkdv", 80, 128, False): [(64, 64, 8, 2), (32, 64, 8, 2)],
    ("dkdv", 80, 128, True): [(16, 64, 8, 1)],
    ("dkdv", 80, 256, False): [(32, 32, 8, 1)],
    ("dkdv", 80, 256, True): [(16, 32, 8, 1)],
    ("dkdv", 90, 64, False): [(64, 128, 8, 2), (64, 64, 8, 2), (32, 128, 8, 2)],
    ("dkdv", 90, 64, True): [(32, 128, 8, 2)],
    ("dkdv", 90, 128, False): [(32, 128, 8, 2)],
    ("dkdv", 90, 128, True): [(16, 64, 8, 1)],
    ("dkdv", 90, 256, False): [(16, 64, 8, 2)],
    ("dkdv", 90, 256, True): [(16, 32, 8, 1)],
    ("dkdv", 100, 64, False): [(64, 128, 8, 2), (64, 64, 8, 2)],
    ("dkdv", 100, 64, True): [(16, 32, 8, 1)],
    ("dkdv", 100, 128, False): [(32, 64, 8, 2)],
    ("dkdv", 100, 128, True): [(16, 64, 8, 1)],
    ("dkdv", 100, 256, False): [(32, 32, 8, 1)],
    ("dkdv", 100, 256, True): [(16, 32, 8, 1)],
}
