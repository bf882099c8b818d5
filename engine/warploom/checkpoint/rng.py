"""The random states of a process: Python's random, numpy's global generator, torch on the CPU and each CUDA device."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from warploom.errors import UserError


def capture() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of every global generator, as tensors and as JSON, for CheckpointState.rng and its meta.

    CUDA devices are included once CUDA is in use; asking sooner would start it on every device.
    """
    version, internal, gauss_next = random.getstate()
    numpy = np.random.get_state(legacy=False)
    tensors = {
        "python": torch.tensor(internal, dtype=torch.int64),
        "numpy": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
        "torch.cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        tensors |= {f"torch.cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    scalars = {
        "python": {"version": version, "gauss_next": gauss_next},
        "numpy": {
            "bit_generator": numpy["bit_generator"],
            "pos": int(numpy["state"]["pos"]),
            "has_gauss": int(numpy["has_gauss"]),
            "gauss": float(numpy["gauss"]),
        },
    }
    return tensors, scalars


def remember() -> Callable[[], None]:
    """Return what puts the states of all generators back to what they are now. Nothing of it is for a file, so it takes
    a fraction of capture's time."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        for index, state in enumerate(cuda):
            torch.cuda.set_rng_state(state, index)

    return put_back


def digest() -> str:
    """Return a checksum of the states of all generators as they are now, CUDA's left out."""
    tensors, scalars = capture()
    numbers = {name: tensors[name].tolist() for name in ("python", "numpy", "torch.cpu")}
    return xxhash.xxh3_128_hexdigest(json.dumps([numbers, scalars], sort_keys=True).encode())


def restore(tensors: dict[str, Tensor], scalars: dict[str, Any]) -> list[str]:
    """Put every captured state back, exactly. Returns a warning for each that has no place on this machine, or that
    this machine has and the checkpoint has not: the run then goes on, but not bit for bit.

    Raises UserError if the states are not those that capture makes.
    """
    try:
        python, numpy = scalars["python"], scalars["numpy"]
        random.setstate((python["version"], tuple(tensors["python"].tolist()), python["gauss_next"]))
        key = tensors["numpy"].numpy().astype(np.uint32)
        np.random.set_state({**numpy, "state": {"key": key, "pos": numpy["pos"]}})
        torch.set_rng_state(tensors["torch.cpu"])
        saved = sum(name.startswith("torch.cuda.") for name in tensors)
        present = torch.cuda.device_count() if saved or torch.cuda.is_initialized() else 0
        for index in range(min(saved, present)):
            torch.cuda.set_rng_state(tensors[f"torch.cuda.{index}"], index)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"the checkpoint's random states cannot be restored ({error}); start from its weights"
        ) from error
    if saved != present:
        return [
            f"the checkpoint has random states of {saved} CUDA devices and {present} are in use here: "
            "the run does not go on bit for bit"
        ]
    return []
