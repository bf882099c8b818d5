"""Finds cuBLASLt, the library that torch's own products on GPUs run on, for the back end `cublaslt`.

The extension loads it when it is first asked for (csrc/cuda/cublaslt.cpp). A torch built for CUDA has loaded it
already, and its name is enough; else the folders of NVIDIA's Python packages are searched.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from warploom.ops import _extension

MAJOR_VERSIONS = ("13", "12")  # whose interface the extension was written against


def missing(*operators: str) -> str | None:
    """Say why the back end cannot run in this process, None if it can. Loads the library where there is a GPU."""
    return _extension.why_cuda_missing("cublaslt_load", *operators) or _load()[1]


def version() -> str:
    """The version that was loaded, or why none was."""
    if (reason := missing()) is not None:
        return reason
    number, _ = _load()
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


@functools.cache
def _load() -> tuple[int, str | None]:
    """The version as the library says it, or why it is not there."""
    complaints = []
    for name in _candidates():
        try:
            return torch.ops.warploom_cuda.cublaslt_load(name), None
        except RuntimeError as error:
            complaints.append(str(error).splitlines()[0])
    return 0, f"cuBLASLt was not found: {'; '.join(complaints)} (a torch built for CUDA brings it)"


def _candidates() -> Iterator[str]:
    """File names and paths, best first: of the CUDA version that torch was built for, then of the others."""
    ours = (torch.version.cuda or "").split(".")[0]
    for major in sorted(MAJOR_VERSIONS, key=lambda each: each != ours):
        name = f"libcublasLt.so.{major}"
        yield name
        for package in ("nvidia.cublas", f"nvidia.cu{major}"):
            for folder in _folders(package):
                if (folder / "lib" / name).exists():
                    yield str(folder / "lib" / name)


def _folders(package: str) -> list[Path]:
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # not even nvidia
        return []
    return [Path(each) for each in (spec.submodule_search_locations or ())] if spec else []


def refuses_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, need_mask: bool) -> str | None:
    """Say why the library does not take a call of linear_fwd, None if it does."""
    return _refuses(x, weight, bias is not None, activation, need_mask, False)


def refuses_bwd(x: Tensor, weight: Tensor, activation: str, need_dbias: bool) -> str | None:
    """The same of linear_bwd."""
    return _refuses(x, weight, need_dbias, activation, False, True)


def _refuses(*call: Any) -> str | None:
    runs = torch.ops.warploom_cuda.linear_cublaslt_runs(*call)
    return None if runs else "cuBLASLt has no kernel for it on this card"
