"""What each parallel dimension sends, how long that takes, and what it holds, as the number of processes grows.

    python -m bench.scale [--dimension data tensor ...] [--processes 1 2 4] [--steps 5] [--json FILE]

One model and one global batch, on gloo processes of this machine, so more processes have less each. Every dimension
must give the losses of one process within 1e-5, or the bench ends with exit code 1 and nothing is printed of it.

sent       bytes that one process sends in one training step, on average. Every collective of the step is recorded
           where torch dispatches it, and counted at what the best known algorithm for it sends: 2 (n-1)/n of its tensor
           for an all-reduce, (n-1)/n of the whole for an all-gather or reduce-scatter (Thakur et al., 2005).
least      what the dimension has to send by its definition: see LEAST.
messages   the step's collectives alone, one after the other as the step made them, nothing computed, nothing hidden
           behind computing.
state      weights, gradients and moments; peak: the most that tensors took, by the arena's count; both of the fullest
           process.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import tyro
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.harness import print_fingerprint, print_table, write_records
from warploom.errors import UserError
from warploom.models.config import TransformerConfig
from warploom.models.transformer import Transformer
from warploom.optim import OptimizerConfig, build_optimizers
from warploom.optim.parts import local_part
from warploom.parallel.apply import ParallelModel
from warploom.parallel.config import DIMENSIONS, ParallelConfig
from warploom.parallel.mesh import Mesh, processes
from warploom.train.allocator import keep_freed_memory
from warploom.train.step import training_step

MODEL = TransformerConfig(
    d_model=128, num_layers=8, num_heads=8, vocab_size=2048, max_seq_len=128, tie_embeddings=False, activation="gelu"
)
BATCH_SIZE, SEQ_LEN = 8, 128
_ACTIVATIONS = BATCH_SIZE * SEQ_LEN * MODEL.d_model * 4  # bytes of the hidden states of the global batch
_LOSS_TOLERANCE = 1e-5


@functools.cache
def _weights() -> tuple[int, int]:
    """Bytes of the blocks' weights, and of the others."""
    with torch.device("meta"):
        model = Transformer(MODEL)
    blocks = sum(p.nbytes for name, p in model.named_parameters() if ".blocks." in name)
    return blocks, sum(p.nbytes for p in model.parameters()) - blocks


def _least_data(n: int) -> float:
    """Gradients are summed once: an all-reduce of all of them."""
    return 2 * (n - 1) / n * sum(_weights())


def _least_shard(n: int) -> float:
    """Weights are gathered for the forward pass, those of blocks again for the backward pass, and gradients scattered.
    One micro batch; each further one gathers again."""
    blocks, rest = _weights()
    return (n - 1) / n * (3 * blocks + 2 * rest)


def _least_tensor(n: int) -> float:
    """A block gathers and scatters the hidden states around attention and around the feed-forward layer, and the other
    way round in the backward pass (Korthikanti et al., 2022). So do, once, the embedding and the output layer."""
    return (n - 1) / n * (8 * MODEL.num_layers + 4) * _ACTIVATIONS


def _least_pipeline(n: int) -> float:
    """Hidden states cross each border between stages once, and so do their gradients."""
    return 2 * (n - 1) / n * _ACTIVATIONS


def _least_context(n: int) -> float:
    """q, k, v and o are exchanged in each block, and their gradients (Jacobs et al., 2023), and the weights are shared
    out as by shard, since each process has gradients to add."""
    return 8 * MODEL.num_layers * (n - 1) / n * _ACTIVATIONS / n + _least_shard(n)


LEAST: dict[str, Callable[[int], float]] = {
    "data": _least_data,
    "shard": _least_shard,
    "tensor": _least_tensor,
    "pipeline": _least_pipeline,
    "context": _least_context,
}


@dataclass(frozen=True)
class Message:
    """One collective of a group: what this process gives and takes, in bytes, and how to do it again."""

    name: str
    sent_bytes: float
    again: Callable[[], dist.Work]


class Recorder(TorchDispatchMode):
    """Notes every collective that is dispatched inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Message] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_")
            self.messages += _message(name, args)
        return func(*args, **(kwargs or {}))


def _message(name: str, args: tuple) -> list[Message]:
    group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
    n = group.size()
    if n == 1:  # torch runs the collective; nothing goes anywhere
        return []
    share = (n - 1) / n
    like = torch.empty_like
    if name == "allreduce":
        (tensor,) = args[0]
        mine = like(tensor)
        return [Message(name, 2 * share * tensor.nbytes, lambda: group.allreduce(mine))]
    if name == "allgather_base":
        whole, part = like(args[0]), like(args[1])
        return [Message(name, share * whole.nbytes, lambda: group._allgather_base(whole, part))]
    if name == "allgather":
        (parts,), (part,) = args[0], args[1]
        parts, part = [like(each) for each in parts], like(part)
        return [Message(name, (n - 1) * part.nbytes, lambda: group.allgather([parts], [part]))]
    if name == "reduce_scatter_base":
        part, whole = like(args[0]), like(args[1])
        return [Message(name, share * whole.nbytes, lambda: group._reduce_scatter_base(part, whole))]
    if name == "alltoall_base":
        taken, given, (taken_sizes, given_sizes) = like(args[0]), like(args[1]), args[3:5]
        kept = given_sizes[group.rank()] if given_sizes else len(given) // n
        sent = given.nbytes - kept * given[:1].nbytes
        return [Message(name, sent, lambda: group.alltoall_base(taken, given, taken_sizes, given_sizes))]
    if name in ("send", "recv"):
        (tensor,), other, tag = args[0], *args[2:4]
        mine, call = like(tensor), group.send if name == "send" else group.recv
        return [Message(name, tensor.nbytes if name == "send" else 0.0, lambda: call([mine], other, tag))]
    raise AssertionError(f"a training step has a collective that is not counted: {name}")


def send_again(messages: list[Message]) -> float:
    """Make the same collectives once more and return the seconds. What is sent from one to one is waited for at the
    end, as stages do; the others one by one."""
    dist.barrier()
    started = time.perf_counter()
    open_ = []
    for message in messages:
        work = message.again()
        if message.name in ("send", "recv"):
            open_.append(work)
        else:
            work.wait()
    for work in open_:
        work.wait()
    return time.perf_counter() - started


def work(dimension: str, steps: int) -> dict[str, Any]:
    """What one process of the world finds."""
    n = dist.get_world_size()
    sizes = ParallelConfig(**{"data": 1, dimension: n})
    torch.manual_seed(0)
    keep_freed_memory()
    micro = {"data": BATCH_SIZE // n, "shard": BATCH_SIZE // n, "pipeline": 1}.get(dimension, BATCH_SIZE)
    parallel = ParallelModel(Transformer(MODEL), Mesh(sizes, "cpu"), micro)
    optimizers = build_optimizers(parallel.module, OptimizerConfig(name="adamw"), exchange=parallel.matrices)
    tokens = torch.randint(MODEL.vocab_size, (BATCH_SIZE, SEQ_LEN + 1))
    batch = SimpleNamespace(tokens=tokens[:, :-1].contiguous(), targets=tokens[:, 1:].contiguous())

    def step() -> float:
        return training_step(
            parallel.loss_sum, [batch], parallel.parameters, optimizers, grad_clip=1.0, processes=parallel
        ).loss

    losses = [step()]  # sets up what is sent once in a run
    step_s = []
    for _ in range(steps):
        dist.barrier()
        started = time.perf_counter()
        losses.append(step())
        step_s.append(time.perf_counter() - started)
    peak = torch.ops.warploom_cpu.arena_statistics()["peak_bytes"]
    # Last, since what is recorded holds memory: tensors for every collective, to send again.
    with Recorder() as recorder:
        losses.append(step())
    return {
        "losses": losses,
        "sent_bytes": sum(message.sent_bytes for message in recorder.messages),
        "messages": len(recorder.messages),
        "step_s": statistics.median(step_s),
        "messages_s": statistics.median(send_again(recorder.messages) for _ in range(steps)),
        "state_bytes": _state_bytes(parallel, optimizers),
        "peak_bytes": peak,
    }


def _state_bytes(parallel: ParallelModel, optimizers: Any) -> int:
    held: list[Tensor] = []
    for parameter in parallel.parameters:
        held += [local_part(parameter.detach()), *([] if parameter.grad is None else [local_part(parameter.grad)])]
        for optimizer in optimizers:
            moments = optimizer.state.get(parameter, {}).values()
            held += [local_part(x) for x in moments if isinstance(x, Tensor)]
    return sum(tensor.nbytes for tensor in held)


def _be(rank: int, n: int, port: int, path: Path, dimension: str, steps: int) -> None:
    """Be one of n processes, and write what it finds."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with processes("cpu"):
        path.write_text(json.dumps(work(dimension, steps)))


def bench(dimension: str, n: int, steps: int) -> dict[str, Any]:
    """Start n processes, and return what they found together."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        paths = [Path(folder) / f"{rank}.json" for rank in range(n)]
        # Forks of this one, which has imported everything and has no threads: a start is a tenth of a second.
        fork = multiprocessing.get_context("fork").Process
        children = [fork(target=_be, args=(rank, n, port, path, dimension, steps)) for rank, path in enumerate(paths)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        if any(child.exitcode for child in children):
            sys.exit(f"{dimension} on {n} processes failed")
        found = [json.loads(path.read_text()) for path in paths]
    return {
        "dimension": dimension,
        "processes": n,
        "losses": found[0]["losses"],
        "sent_bytes": statistics.mean(one["sent_bytes"] for one in found),
        "least_bytes": LEAST[dimension](n),
        "messages": max(one["messages"] for one in found),
        **{name: max(one[name] for one in found) for name in ("step_s", "messages_s", "state_bytes", "peak_bytes")},
    }


@dataclass(frozen=True)
class Options:
    """Count and time what the processes of each parallel dimension send."""

    dimension: tuple[str, ...] = tuple(LEAST)
    processes: tuple[int, ...] = (1, 2, 4)
    """How many to start; 1 is always among them. At most 8, the heads and the blocks of the model."""
    steps: int = 5
    """Steps that are timed."""
    json: Path | None = None
    """Write the records here too."""


def main(options: Options) -> None:
    unknown = [name for name in options.dimension if name not in DIMENSIONS]
    if unknown:
        raise UserError(f"dimension is {unknown[0]!r}; known: {', '.join(LEAST)}")
    torch.set_num_threads(1)
    print_fingerprint()
    alone = {**bench("data", 1, options.steps), "dimension": "one process"}
    records = [alone]
    for dimension in options.dimension:
        for n in sorted(set(options.processes) - {1}):
            record = bench(dimension, n, options.steps)
            off = max(abs(loss / right - 1) for loss, right in zip(record["losses"], alone["losses"], strict=True))
            if not off <= _LOSS_TOLERANCE:
                sys.exit(f"{dimension} on {n} processes is wrong: its losses differ by {off:.1e}")
            records.append(record)
    print_table(
        f"batch {BATCH_SIZE} x {SEQ_LEN}, {MODEL.num_layers} layers of width {MODEL.d_model}, "
        f"{sum(_weights()) / 1e6:.1f} MB of weights, float32",
        (
            "dimension",
            "processes",
            "sent MB",
            "least MB",
            "ratio",
            "calls",
            "step ms",
            "messages ms",
            "state MB",
            "peak MB",
        ),
        [
            (
                record["dimension"],
                str(record["processes"]),
                f"{record['sent_bytes'] / 1e6:.2f}",
                f"{record['least_bytes'] / 1e6:.2f}",
                f"{record['sent_bytes'] / record['least_bytes']:.3f}" if record["least_bytes"] else "",
                str(record["messages"]),
                f"{record['step_s'] * 1e3:,.0f}",
                f"{record['messages_s'] * 1e3:,.1f}",
                f"{record['state_bytes'] / 1e6:.1f}",
                f"{record['peak_bytes'] / 1e6:.1f}",
            )
            for record in records
        ],
    )
    write_records(options.json, records)


if __name__ == "__main__":
    main(tyro.cli(Options))
