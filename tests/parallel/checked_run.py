"""One process of the tests of checked collectives: makes each mistake of MISTAKES, then trains in every dimension.
Start with torch.distributed.run; argv[1] is a folder for one result file per rank."""

import json
import sys
from pathlib import Path

import parity_run
import torch
import torch.distributed as dist

from warploom.errors import CollectiveMismatch
from warploom.parallel.mesh import processes

LAYOUTS = {
    "shard, Muon": {"parallel": {"shard": 2}, "optimizer": "muon"},
    "tensor": {"parallel": {"tensor": 2}},
    "context": {"parallel": {"context": 2}, "packed": True},
    "pipeline, tied copies": {"parallel": {"pipeline": 2}, "model": {"position": "t5"}},
    "interleaved": {"parallel": {"pipeline": 2, "schedule": "interleaved"}},
}


def shape(rank, group):
    dist.all_reduce(torch.zeros(2 + rank), group=group)


def dtype(rank, group):
    dist.all_reduce(torch.zeros(2, dtype=(torch.float32, torch.int64)[rank]), group=group)


def reduction(rank, group):
    dist.all_reduce(torch.zeros(2), op=(dist.ReduceOp.SUM, dist.ReduceOp.MAX)[rank], group=group)


def operation(rank, group):
    if rank == 0:
        dist.all_reduce(torch.zeros(2), group=group)
    else:
        dist.broadcast(torch.zeros(2), 0, group=group)


def root(rank, group):
    dist.broadcast(torch.zeros(2), rank, group=group)


def order(rank, group):
    """The first is alike, then each has swapped two."""
    dist.barrier(group=group)
    calls = [lambda: dist.all_reduce(torch.zeros(2), group=group), lambda: dist.all_reduce(torch.zeros(3), group=group)]
    for call in calls[:: 1 if rank == 0 else -1]:
        call()


def groups(rank, group):
    """The same in two groups, in another order."""
    other = dist.new_group([0, 1])
    for each in (group, other) if rank == 0 else (other, group):
        dist.all_reduce(torch.zeros(2), group=each)


def splits(rank, group):
    sizes = ([2, 2], [3, 2])[rank]
    dist.all_to_all_single(torch.zeros(4), torch.zeros(sum(sizes)), [2, 2], sizes, group=group)


def message(rank, group):
    if rank == 0:
        dist.isend(torch.zeros(3), 1, group=group)
    dist.barrier(group=group)
    if rank == 1:
        dist.irecv(torch.zeros(4), 0, group=group)


MISTAKES = {f.__name__: f for f in (shape, dtype, reduction, operation, root, order, groups, splits, message)}


def said(mistake):
    try:
        mistake(dist.get_rank(), dist.new_group([0, 1]))
    except CollectiveMismatch as error:
        return str(error)
    return None


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    parity_run.STEPS = 2
    with processes("cpu", timeout_s=60.0):
        unchecked = {name: parity_run.together(case)[0] for name, case in LAYOUTS.items()}
    with processes("cpu", timeout_s=60.0, check_collectives=True):
        errors = {name: said(mistake) for name, mistake in MISTAKES.items()}
        checked = {name: parity_run.together(case)[0] for name, case in LAYOUTS.items()}
        result = {"errors": errors, "equal": {name: checked[name] == unchecked[name] for name in LAYOUTS}}
        (folder / f"{dist.get_rank()}.json").write_text(json.dumps(result))
        dist.barrier()


if __name__ == "__main__":
    main()
