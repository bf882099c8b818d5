"""One process of a check that what any layout saved, any other loads, the same bits. Start with torch.distributed.run;
argv[1] is a folder for the checkpoints and one result file per rank."""

import functools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from warploom.checkpoint import load_checkpoint
from warploom.checkpoint.ranks import load_over_ranks, save_over_ranks
from warploom.models.config import TransformerConfig
from warploom.models.transformer import Transformer
from warploom.optim import OptimizerConfig, build_optimizers
from warploom.optim.parts import local_part
from warploom.parallel.apply import ParallelModel
from warploom.parallel.config import ParallelConfig
from warploom.parallel.mesh import Mesh, processes
from warploom.train import run_state
from warploom.train.config import RunConfig

LAYOUTS = {
    "data": {"data": 4},
    "shard": {"shard": 4},
    "tensor": {"tensor": 4},
    "context": {"context": 4},
    "pipeline": {"pipeline": 4},
    "interleaved x data": {"data": 2, "pipeline": 2, "schedule": "interleaved"},
    "shard x tensor": {"shard": 2, "tensor": 2},
    "pipeline x tensor": {"pipeline": 2, "tensor": 2},
}
CONFIG = RunConfig(
    model=TransformerConfig(
        d_model=24, num_layers=4, num_heads=6, head_dim=4, vocab_size=61, max_seq_len=256, d_ff=50, position="t5"
    )
)


class NoData:
    def state_dict(self):
        return {"position": 3}


@functools.cache
def mesh_of(name):
    """One mesh for each layout: every group of processes is a thread, which all take their turn on the processor."""
    return Mesh(ParallelConfig(**LAYOUTS[name]).resolve(dist.get_world_size()), "cpu")


def build(layout):
    torch.manual_seed(2)
    mesh = mesh_of(layout)
    parallel = ParallelModel(Transformer(CONFIG.model), mesh, 2)
    config = OptimizerConfig(name="muon")
    return parallel, build_optimizers(parallel.module, config, exchange=parallel.matrices)


def reference(shape, name, key):
    """What a whole tensor holds: numbers that its name alone decides."""
    generator = torch.Generator().manual_seed(sum(map(ord, name + key)))
    return torch.randn(shape, generator=generator)


def parts(parallel, optimizers):
    """Every tensor of this process, with what it must hold."""
    for name, parameter in parallel.named:
        part, shape = parallel.part(name), parallel.shapes[name]
        yield name, "weights", local_part(parameter.detach()), part.of(reference(shape, name, ""))
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                whole = reference(shape if value.dim() else (), name, key)
                yield name, key, local_part(value), part.of(whole) if value.dim() else whole


def save(folder, layout):
    parallel, optimizers = build(layout)
    for parameter in parallel.parameters:
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    for _, _, tensor, expected in parts(parallel, optimizers):
        tensor.copy_(expected)
    torch.manual_seed(100 + dist.get_rank())
    progress = run_state.Progress(num_steps=10, micro_batch_size=2, step=5)
    state = run_state.capture(progress, parallel.module, optimizers, NoData(), CONFIG, None, parallel, "run")
    return save_over_ranks(folder, state, parallel.ranks)


def load(path, layout):
    """Return what differs from the references, and how much was compared."""
    target, optimizers = build(layout)
    found = load_over_ranks(path, target.wanted, target.ranks, on_skip=print)
    messages = []
    run_state.restore(*found, target.module, optimizers, CONFIG, 10, messages.append, target)
    wrong = [message for message in messages if "Going on" not in message]
    compared = list(parts(target, optimizers))
    wrong += [(name, key) for name, key, tensor, expected in compared if not torch.equal(tensor, expected)]
    if torch.initial_seed() != 100 + dist.get_rank():
        wrong.append(f"random state of seed {torch.initial_seed()}")
    return wrong, len(compared)


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    wrong, compared = [], 0
    with processes("cpu", timeout_s=120.0):
        for saved_on in LAYOUTS:
            path = save(folder / saved_on, saved_on)
            for name, tensor in load_checkpoint(path).weights.items():
                wrong += [] if torch.equal(tensor, reference(tensor.shape, name, "")) else [(saved_on, "whole", name)]
            for loaded_on in LAYOUTS:
                differs, number = load(path, loaded_on)
                compared += number
                wrong += [(saved_on, loaded_on, one) for one in differs]
        (folder / f"{dist.get_rank()}.json").write_text(json.dumps({"wrong": wrong, "compared": compared}))


if __name__ == "__main__":
    main()
