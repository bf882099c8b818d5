"""The processes of a run as a grid of five axes, and the place of this process in it."""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from warploom.errors import ProcessLost, UserError
from warploom.parallel import heartbeat
from warploom.parallel.config import DIMENSIONS, ParallelConfig
from warploom.parallel.watched import CollectiveChecks, watched


@dataclass(frozen=True)
class Axis:
    """The processes that differ from this one in one coordinate."""

    group: dist.ProcessGroup
    size: int
    index: int


class Mesh:
    """axis[name] for each of config.DIMENSIONS; "fsdp", which shares out the weights: shard and context together,
    since processes with parts of one sequence have gradients to sum as well; and "matrix": fsdp and tensor together,
    the processes whose parts make up the whole of a weight.

    Ranks are numbered with the axes in the order of DIMENSIONS, the last changing fastest. config must be resolved.
    """

    def __init__(self, config: ParallelConfig, device_type: str) -> None:
        self.config = config
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")
        )
        sizes = config.sizes
        pipeline, data, shard, context, tensor = sizes.values()
        grid = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=DIMENSIONS)
        weights = init_device_mesh(
            device_type, (pipeline, data, shard * context, tensor), mesh_dim_names=("p", "data", "fsdp", "t")
        )
        matrices = init_device_mesh(
            device_type, (pipeline, data, shard * context * tensor), mesh_dim_names=("p", "d", "matrix")
        )
        self.axis = {name: _axis(grid, name) for name in DIMENSIONS}
        self.axis |= {"fsdp": _axis(weights, "fsdp"), "matrix": _axis(matrices, "matrix")}
        self.weights = weights["data", "fsdp"]

    @functools.cached_property
    def side_group(self) -> dist.ProcessGroup:
        """All processes on the CPU, apart from the training's groups: for a thread beside it. All must ask for it first
        at the same time."""
        return dist.new_group(backend="gloo")

    @property
    def num_parts(self) -> int:
        """Into how many parts a batch goes, each with rows of its own."""
        return self.axis["data"].size * self.axis["shard"].size

    @property
    def part(self) -> int:
        """Which of these is this process's."""
        return self.axis["data"].index * self.axis["shard"].size + self.axis["shard"].index

    def barrier(self) -> None:
        """Wait until every process is here."""
        dist.barrier()

    def rank_at(self, **index: int) -> int:
        """Return the rank at these coordinates, on the axes of DIMENSIONS or fsdp; the others are this process's."""
        if "fsdp" in index:
            index["shard"], index["context"] = divmod(index.pop("fsdp"), self.axis["context"].size)
        rank = 0
        for name in DIMENSIONS:
            rank = rank * self.axis[name].size + index.get(name, self.axis[name].index)
        return rank


def _axis(mesh: DeviceMesh, name: str) -> Axis:
    group = mesh.get_group(name)
    return Axis(group, group.size(), mesh.get_local_rank(name))


# What gloo and NCCL say of a process that is gone.
_CONNECTION_LOST = ("Connection reset by peer", "Connection closed by peer", "Broken pipe", "remote process exited")


_joins = itertools.count()  # of this process: the keys of a group that was left are in the store as well


@contextmanager
def processes(device_type: str, timeout_s: float = 1800.0, *, check_collectives: bool = False) -> Iterator[None]:
    """Join the other processes that torchrun started, for the length of a with block: NCCL between GPUs, gloo between
    CPUs. A GPU process takes the GPU of its local rank. check_collectives: see CollectiveChecks.

    Raises UserError if there is no GPU for it, and ProcessLost if another process is gone.
    """
    if device_type == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this machine has no GPU, there are {torch.cuda.device_count()}; "
                f"start that many with --nproc-per-node"
            )
        torch.cuda.set_device(local_rank)
    timeout = timedelta(seconds=timeout_s)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(_incarnation(), store)
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    checks = CollectiveChecks(store, timeout_s) if check_collectives else None
    try:
        with watched(checks) if checks is not None or heartbeat.is_watched() else nullcontext():
            yield
    except RuntimeError as error:
        if not any(words in str(error) for words in _CONNECTION_LOST):
            raise
        raise ProcessLost(f"rank {rank} has lost another process of the run: {error}") from error
    finally:
        dist.destroy_process_group()


def _incarnation() -> str:
    """Return a name for this start of the processes. torchrun's restarts share a store, and meet the dead ones' keys in
    it without one: of 8 runs with a killed process 1 came back, with the name 8 (gloo, torch 2.13)."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
    # torchrun's machines count restarts each for itself, so there they need not agree. Those of `warploom launch` agree
    # on the run id, which is another one for each start.
    is_one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if is_one_machine else ""
    return f"{run_id}/{restart}/{next(_joins)}"


def split_sizes(total: int, parts: int) -> list[int]:
    """Return sizes that add up to total and differ by one at most, the larger first."""
    return [total // parts + (index < total % parts) for index in range(parts)]


def chunk_range(total: int, parts: int, index: int) -> tuple[int, int]:
    """Return start and stop of part index as torch.chunk cuts, which leaves the last parts short or empty."""
    size = math.ceil(total / parts)
    return min(total, size * index), min(total, size * (index + 1))
