"""What a checkpoint holds of a model in parts: which process writes what of it, and which part of it each one reads.

A checkpoint has whole tensors under their own names, in however many parts: what was saved on one layout is read on
another, bit for bit. Replicas have the same numbers, and share out the writing of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from warploom.optim.parts import local_part
from warploom.parallel.config import process_seed

if TYPE_CHECKING:
    from warploom.parallel.apply import ParallelModel


class State(Protocol):
    """A checkpoint.CheckpointState, whose meta has "optimizer" (by name, as flatten_optimizer says it) and "rng"."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]  # "<optimizer>/<parameter>/<key>"
    meta: dict[str, Any]
    rng: dict[str, Tensor]


Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a part begins in its tensor, and its shape."""


class Ranks:
    """A checkpoint.ranks.Ranks: the processes of a parallel model, which all make theirs at the same time.

    They speak over a group apart, so that a thread that saves does not disturb the training.
    """

    def __init__(self, parallel: ParallelModel) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._shapes, self._group = parallel.shapes, parallel.mesh.side_group

    def exchange(self, value: Any) -> list[Any]:
        return all_json(value, self._group)

    def own_meta(self, meta: dict[str, Any]) -> dict[str, Any]:
        return {"optimizer": meta["optimizer"], "rng": meta["rng"]}

    def whole_meta(self, meta: dict[str, Any], own: list[dict[str, Any]]) -> dict[str, Any]:
        optimizers = {
            name: _whole_values(self._shapes, [one["optimizer"][name] for one in own])
            for name in sorted(meta["optimizer"])
        }
        return {**meta, "optimizer": optimizers, "rng_of_ranks": [one["rng"] for one in own]}


def own_share(parallel: ParallelModel, state: State) -> dict[str, tuple[torch.Size, Box]]:
    """Leave in a state, whose optimizer tensors and random states are this process's, what it is to write of them, and
    put its weights there. Return the shape of the whole and the place in it of each tensor that is a part."""
    rank = dist.get_rank()
    writers = _writers(parallel)
    mine = {name: part for name, each in writers.items() for who, part in each if who == rank}
    numbers = {name for name, each in writers.items() if each and each[0][0] == rank}
    places: dict[str, tuple[torch.Size, Box]] = {}

    def note(path: str, name: str) -> None:
        if mine[name].shape != tuple(parallel.shapes[name]):
            places[path] = parallel.shapes[name], (mine[name].start, mine[name].shape)

    state.weights = {}
    for name, parameter in parallel.named:
        # A stage may hold the same parameter twice; both are the same numbers.
        if name in mine and name not in state.weights:
            state.weights[name] = local_part(parameter.detach())
            note(name, name)
    optimizer = {}
    for path, tensor in state.optimizer.items():
        _, name, _ = _split(path)
        if tensor.dim() and name in mine:
            optimizer[path] = local_part(tensor)
            note(path, name)
        elif not tensor.dim() and name in numbers:  # the same on all processes
            optimizer[path] = tensor
    state.optimizer = optimizer
    if rank:
        state.rng = {f"rank{rank}/{name}": tensor for name, tensor in state.rng.items()}
    return places


def _writers(parallel: ParallelModel) -> dict[str, list[tuple[int, Any]]]:
    """Return for each parameter the ranks that write its parts, and which these are; empty parts left out.

    Whole parameters go round the replicas, always to the one that has least to write.
    """
    numel = [0] * parallel.mesh.axis["data"].size
    writers = {}
    for name, shape in parallel.shapes.items():
        replica = numel.index(min(numel))
        numel[replica] += shape.numel()
        writers[name] = [(rank, part) for rank, part in parallel.holders(name, replica) if 0 not in part.shape]
    return writers


def wanted(parallel: ParallelModel, kind: str, path: str, shape: tuple[int, ...]) -> Box | None:
    """Return which part of a checkpoint's tensor this process needs, None for no part: a checkpoint.load.Take."""
    rank = dist.get_rank()
    if kind == "rng.safetensors":
        owner = int(path.split("/")[0].removeprefix("rank")) if "/" in path else 0
        return ((0,) * len(shape), shape) if owner in (rank, 0) else None
    name = path if kind == "model.safetensors" else _split(path)[1]
    if name not in parallel.names or (shape and tuple(parallel.shapes[name]) != shape):
        return None
    part = parallel.part(name)
    return (part.start, part.shape) if shape or not parallel.shapes[name] else ((), ())


def take_up(parallel: ParallelModel, state: State) -> None:
    """Copy this process's weights into its parameters, and leave in the state what is here of the rest.

    state: as loaded with wanted. A process that the checkpoint has no random states of gets those of a new run.
    """
    with torch.no_grad():
        for name, parameter in parallel.named:
            local_part(parameter).copy_(state.weights[name])
    own = dict(parallel.named)
    for optimizer, values in state.meta["optimizer"].items():
        state.meta["optimizer"][optimizer] = {
            **values,
            "groups": [
                {**group, "parameters": [name for name in group["parameters"] if name in own]}
                for group in values["groups"]
            ],
            "parameters": {
                name: {**entry, "shape": list(own[name].shape)}
                for name, entry in values["parameters"].items()
                if name in own
            },
        }
    _take_random_states(state)


def _take_random_states(state: State) -> None:
    rank = dist.get_rank()
    of_ranks = state.meta.get("rng_of_ranks", [state.meta["rng"]])
    if rank < len(of_ranks):
        prefix = f"rank{rank}/" if rank else ""
        state.meta["rng"] = of_ranks[rank]
        state.rng = {
            name.removeprefix(prefix): x
            for name, x in state.rng.items()
            if name.startswith(prefix) and (rank or "/" not in name)
        }
    elif "torch.cpu" in state.rng:
        state.rng["torch.cpu"] = (
            torch.Generator().manual_seed(process_seed(state.meta["config"]["train"]["seed"], rank)).get_state()
        )


def _split(path: str) -> tuple[str, str, str]:
    optimizer, rest = path.split("/", 1)
    return optimizer, *rest.rsplit("/", 1)  # type: ignore[return-value]


def _whole_values(shapes: Mapping[str, torch.Size], said: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what flatten_optimizer says of all processes' parameters together."""
    parameters: dict[str, Any] = {}
    for name, shape in shapes.items():
        entry = next((one["parameters"][name] for one in said if name in one["parameters"]), None)
        if entry is not None:
            parameters[name] = {**entry, "shape": list(shape)}
    groups = said[0]["groups"]
    for index, group in enumerate(groups):
        members = {name for one in said for name in one["groups"][index]["parameters"]}
        group["parameters"] = [name for name in shapes if name in members]
    return {**said[0], "groups": groups, "parameters": parameters}


def all_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return what each process of a group, by default all, gives, by rank: JSON values."""
    data = json.dumps(value).encode()
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    n = dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(n)]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device), group=group)
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    received = [torch.empty_like(padded) for _ in range(n)]
    dist.all_gather(received, padded, group=group)
    return [json.loads(part[: int(size)].cpu().numpy().tobytes()) for part, size in zip(received, sizes, strict=True)]
