"""Threads in the place of a run's processes, and states cut into their parts."""

import dataclasses
import json
import threading

from warploom.checkpoint.format import Place

TIMEOUT_S = 30


class ThreadRanks:
    """A checkpoint.ranks.Ranks of one thread; its fellows are in `all`."""

    def __init__(self, rank, size, shared):
        self.rank, self.size, self._shared = rank, size, shared

    def exchange(self, value):
        values, barrier = self._shared
        values[self.rank] = json.dumps(value)
        barrier.wait(TIMEOUT_S)
        said = [json.loads(one) for one in values]
        barrier.wait(TIMEOUT_S)
        return said

    def own_meta(self, meta):
        return {"own": meta["own"]}

    def whole_meta(self, meta, own):
        return {**meta, "own": [one["own"] for one in own]}


def together(size, work):
    """Call work(ranks) on size threads. Return what each returned or raised, by rank."""
    shared = [None] * size, threading.Barrier(size)
    results = [None] * size

    def run(rank):
        try:
            results[rank] = work(ThreadRanks(rank, size, shared))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def share(state, rank, size):
    """What process rank of size writes of a state: a part of the rows of every matrix, some of the other tensors."""
    places = {}

    def cut(tensors):
        mine = {}
        for index, (name, tensor) in enumerate(sorted(tensors.items())):
            if tensor.dim() < 2 or len(tensor) < size:
                if index % size == rank:
                    mine[name] = tensor
                continue
            first, last = (len(tensor) * edge // size for edge in (rank, rank + 1))
            mine[name] = tensor[first:last]
            places[name] = Place(tuple(tensor.shape), (first, *[0] * (tensor.dim() - 1)))
        return mine

    weights, optimizer = cut(state.weights), cut(state.optimizer)
    rng = state.rng if rank == 0 else {f"rank{rank}/{name}": tensor + rank for name, tensor in state.rng.items()}
    meta = {**state.meta, "own": rank}
    return dataclasses.replace(state, weights=weights, optimizer=optimizer, rng=rng, meta=meta, places=places)


def whole(state, size):
    """The state that loading finds: the meta of all, and the random states of all."""
    expected = dataclasses.replace(state, meta={**state.meta, "own": list(range(size))}, rng=dict(state.rng))
    for rank in range(1, size):
        expected.rng |= {f"rank{rank}/{name}": tensor + rank for name, tensor in state.rng.items()}
    return expected


def take_rows(rank, size):
    """A load.Take of the same parts that share cuts."""

    def take(kind, name, shape):
        if kind == "rng.safetensors":
            return ((0,) * len(shape), shape) if name.startswith(f"rank{rank}/") else None
        if len(shape) < 2 or shape[0] < size:
            return (0,) * len(shape), shape
        first, last = (shape[0] * edge // size for edge in (rank, rank + 1))
        return (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])

    return take
