"""From the environment that torchrun makes to the processes of a run, and back to one process where there is none."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from warploom.errors import UserError
from warploom.train.config import RunConfig
from warploom.train.device import choose_device

if TYPE_CHECKING:
    from warploom.parallel.apply import Parallelize


def is_first_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def joined(config: RunConfig) -> Iterator[tuple[RunConfig, Parallelize | None]]:
    """Join the processes that torchrun started, for the length of a with block. Give the configuration with the sizes
    filled in, and what spreads a model over the processes, None for one process.

    Raises UserError if the sizes do not fit the processes, the model or the batch.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        config = _resolved(config, world_size)
    except UserError:
        if is_first_process():
            raise
        raise SystemExit(2) from None  # said once
    if world_size == 1:
        yield config, None
        return
    # What these import takes a second and more, which a run of one process shall not wait for.
    apply = importlib.import_module("warploom.parallel.apply")
    mesh = importlib.import_module("warploom.parallel.mesh")
    device_type = choose_device(config.train.device).type
    with mesh.processes(device_type, check_collectives=config.parallel.check_collectives):
        yield config, apply.Parallelize(mesh.Mesh(config.parallel, device_type))


def _resolved(config: RunConfig, world_size: int) -> RunConfig:
    parallel = config.parallel.resolve(world_size)
    config = dataclasses.replace(config, parallel=parallel)
    parallel.check_model(config.model, config.train.seq_len)
    parts = parallel.data * parallel.shard
    if parts > config.train.global_batch_size:
        raise UserError(
            f"parallel.data {parallel.data} * parallel.shard {parallel.shard} share out the rows of a batch, and "
            f"train.global_batch_size is {config.train.global_batch_size}; give {parts} or more"
        )
    return config
