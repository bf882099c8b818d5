"""What a checkpoint holds of a model in parts: gathered whole into the first process, and taken apart again.

Whole tensors under their own names are one format for every layout, one process included: what was saved on one layout
is read on another, bit for bit. One process writes, so a checkpoint is committed as that of one process is: by one
rename, after which it is there as a whole, and before which it is not there at all.
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
from warploom.parallel.shard import Part

if TYPE_CHECKING:
    from warploom.parallel.apply import ParallelModel


class State(Protocol):
    """A checkpoint.CheckpointState, whose meta has "optimizer" (by name, as flatten_optimizer says it) and "rng"."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]  # "<optimizer>/<parameter>/<key>"
    meta: dict[str, Any]
    rng: dict[str, Tensor]


def gather(parallel: ParallelModel, state: State) -> None:
    """Turn a state with this process's part of the optimizers and its random states into that of all, on rank 0.

    Elsewhere the tensors are dropped. Every process must call.
    """
    tensors: dict[str, dict[str, Tensor]] = {"weights": {name: local_part(p) for name, p in parallel.named}}
    for path, tensor in state.optimizer.items():
        optimizer, name, key = _split(path)
        tensors.setdefault(f"{optimizer}/{key}", {})[name] = tensor
    whole = gather_whole(parallel, tensors)
    state.weights = whole.pop("weights", {})
    state.optimizer = {}
    for kind, parts in whole.items():
        optimizer, key = kind.split("/")
        state.optimizer |= {f"{optimizer}/{name}/{key}": tensor for name, tensor in parts.items()}
    values = state.meta["optimizer"]
    state.meta["optimizer"] = {optimizer: _whole_values(parallel, values[optimizer]) for optimizer in sorted(values)}
    said = all_json({"tensors": {n: x.tolist() for n, x in state.rng.items()}, "scalars": state.meta["rng"]})
    for rank, one in enumerate(said[1:], start=1):
        for name, numbers in one["tensors"].items():
            state.rng[f"rank{rank}/{name}"] = torch.tensor(numbers, dtype=_RNG_DTYPES.get(name, torch.uint8))
    state.meta["rng_of_ranks"] = [one["scalars"] for one in said]


def take_apart(parallel: ParallelModel, state: State) -> list[str]:
    """Copy this process's parts of whole weights into its parameters, and leave in the state its part of the rest.

    The weights must fit the whole model. Returns a sentence if the random states cannot be taken up, since they are
    those of another number of processes.
    """
    with torch.no_grad():
        for name, parameter in parallel.named:
            local_part(parameter).copy_(parallel.part(name).of(state.weights[name]))
    own = dict(parallel.named)
    parts = {}
    for path, whole in state.optimizer.items():
        _, name, _ = _split(path)
        if name in own:
            parts[path] = parallel.part(name).of(whole) if whole.dim() else whole
    state.optimizer = parts
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
    return _take_random_states(state)


def _take_random_states(state: State) -> list[str]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
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
    if len(of_ranks) == world_size:
        return []
    return [
        f"the checkpoint has random states of {len(of_ranks)} processes and there are {world_size} here: dropout does "
        "not go on bit for bit"
    ]


def _split(path: str) -> tuple[str, str, str]:
    optimizer, rest = path.split("/", 1)
    return optimizer, *rest.rsplit("/", 1)  # type: ignore[return-value]


def _whole_values(parallel: ParallelModel, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what flatten_optimizer says of all processes' parameters together."""
    said = all_json(values)
    parameters: dict[str, Any] = {}
    for name, shape in parallel.shapes.items():
        entry = next((one["parameters"][name] for one in said if name in one["parameters"]), None)
        if entry is not None:
            parameters[name] = {**entry, "shape": list(shape)}
    groups = said[0]["groups"]
    for index, group in enumerate(groups):
        members = {name for one in said for name in one["groups"][index]["parameters"]}
        group["parameters"] = [name for name in parallel.shapes if name in members]
    return {**said[0], "groups": groups, "parameters": parameters}


# What the states of rng.capture are made of; those of torch's generators are bytes.
_RNG_DTYPES = {"python": torch.int64, "numpy": torch.int64}


def gather_whole(parallel: ParallelModel, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Return, on rank 0, whole tensors on the CPU of the parts of all processes; empty dicts elsewhere.

    tensors: kind (weights, say, or a key of an optimizer's state) -> parameter name -> this process's part, or a number
    that is the same on all processes. One tensor at a time is on its way. Every process must call.
    """
    here = dist.get_rank()
    known = {kind: {name: (_dtype_name(x), x.dim()) for name, x in parts.items()} for kind, parts in tensors.items()}
    said = all_json(known)
    gathered: dict[str, dict[str, Tensor]] = {}
    for kind in sorted({kind for one in said for kind in one}):
        gathered[kind] = {}
        for name, shape in parallel.shapes.items():
            holders = parallel.holders(name)
            if name not in said[holders[0][0]].get(kind, {}):
                continue
            dtype_name, dims = said[holders[0][0]][kind][name]
            if not dims:  # a number
                holders = [(holders[0][0], Part((), ()))]
            whole = torch.empty(shape if dims else (), dtype=getattr(torch, dtype_name)) if here == 0 else None
            for rank, part in holders:
                piece = tensors[kind][name].detach() if here == rank else None
                if 0 not in part.shape:
                    _bring(piece, rank, part, whole, parallel.mesh.device)
            if whole is not None:
                gathered[kind][name] = whole
    return gathered


def _bring(piece: Tensor | None, rank: int, part: Part, whole: Tensor | None, device: torch.device) -> None:
    """Copy a piece that is on one process into its place in a tensor that is on rank 0."""
    if whole is None:
        if piece is not None:
            dist.send(piece.to(device).contiguous(), 0)
        return
    if piece is None:
        piece = torch.empty(part.shape, dtype=whole.dtype, device=device)
        dist.recv(piece, rank)
    part.of(whole).copy_(piece)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def all_json(value: Any) -> list[Any]:
    """Return what each process gives, by rank: JSON values."""
    data = json.dumps(value).encode()
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    n = dist.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(n)]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    received = [torch.empty_like(padded) for _ in range(n)]
    dist.all_gather(received, padded)
    return [json.loads(part[: int(size)].cpu().numpy().tobytes()) for part, size in zip(received, sizes, strict=True)]
