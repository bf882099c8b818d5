"""One process of a check that state gathered from any layout, and given to any, is the same bits. Start with
torch.distributed.run; argv[1] is a folder for one result file per rank."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from warploom.checkpoint import flatten_optimizer, restore_optimizer
from warploom.checkpoint.rng import capture
from warploom.models.config import TransformerConfig
from warploom.models.transformer import Transformer
from warploom.optim import OptimizerConfig, build_optimizers
from warploom.optim.parts import local_part
from warploom.parallel.apply import ParallelModel
from warploom.parallel.config import ParallelConfig
from warploom.parallel.mesh import Mesh, processes

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
CONFIG = TransformerConfig(
    d_model=24, num_layers=4, num_heads=6, head_dim=4, vocab_size=61, max_seq_len=16, d_ff=50, position="t5"
)


def build(layout, seed):
    torch.manual_seed(seed)
    mesh = Mesh(ParallelConfig(**layout).resolve(dist.get_world_size()), "cpu")
    parallel = ParallelModel(Transformer(CONFIG), mesh, 2)
    config = OptimizerConfig(name="muon")
    return parallel, build_optimizers(parallel.module, config, exchange=parallel.matrices)


def step(parallel, optimizers):
    """One step on gradients that are a function of the weights, so that copies stay copies."""
    for parameter in parallel.parameters:
        parameter.grad = parameter.detach() * 0.1
    for optimizer in optimizers:
        optimizer.step()


def gathered(parallel, optimizers):
    tensors, values = {}, {}
    for optimizer in optimizers:
        name = type(optimizer).__name__.lower()
        here, values[name] = flatten_optimizer(optimizer, parallel.named, prefix=f"{name}/")
        tensors |= here
    rng, scalars = capture()
    meta = {"optimizer": values, "rng": scalars, "config": {"train": {"seed": 0}}}
    state = SimpleNamespace(weights={}, optimizer=tensors, meta=meta, rng=rng)
    parallel.gather(state)
    return state


def everywhere(tensors):
    """Send rank 0's tensors to all, as a checkpoint on a shared disk does."""
    names = sorted(tensors) if dist.get_rank() == 0 else []
    result = {}
    said = [None]
    if dist.get_rank() == 0:
        said = [[(name, list(tensors[name].shape), str(tensors[name].dtype)[6:]) for name in names]]
    dist.broadcast_object_list(said)
    for name, shape, dtype in said[0]:
        tensor = tensors[name].contiguous() if dist.get_rank() == 0 else torch.empty(shape, dtype=getattr(torch, dtype))
        dist.broadcast(tensor, 0)
        result[name] = tensor
    return result


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    wrong, compared = [], 0
    with processes("cpu", timeout_s=120.0):
        for saved_on, layout in LAYOUTS.items():
            parallel, optimizers = build(layout, seed=1)
            step(parallel, optimizers)
            state = gathered(parallel, optimizers)
            weights, moments, rng = (everywhere(x) for x in (state.weights, state.optimizer, state.rng))
            values = [state.meta]
            dist.broadcast_object_list(values)
            for loaded_on, other in LAYOUTS.items():
                target, target_optimizers = build(other, seed=2)
                meta = json.loads(json.dumps(values[0]))
                copy = SimpleNamespace(weights=weights, optimizer=dict(moments), meta=meta, rng=dict(rng))
                messages = target.take_apart(copy)
                for optimizer in target_optimizers:
                    name = type(optimizer).__name__.lower()
                    restore_optimizer(
                        optimizer, copy.optimizer, copy.meta["optimizer"][name], target.named, prefix=f"{name}/"
                    )
                for name, parameter in target.named:
                    same = torch.equal(local_part(parameter.detach()), target.part(name).of(weights[name]))
                    compared += 1
                    if not same:
                        wrong.append((saved_on, loaded_on, name))
                again = gathered(target, target_optimizers)
                if dist.get_rank() == 0:
                    for kind, before, after in (
                        ("weights", weights, again.weights),
                        ("optimizer", moments, again.optimizer),
                    ):
                        if before.keys() != after.keys():
                            wrong.append((saved_on, loaded_on, kind, sorted(before.keys() ^ after.keys())[:3]))
                        else:
                            differing = [name for name in before if not torch.equal(before[name], after[name])]
                            compared += len(before)
                            wrong += [(saved_on, loaded_on, kind, name) for name in differing[:3]]
                if messages:
                    wrong.append((saved_on, loaded_on, messages))
        (folder / f"{dist.get_rank()}.json").write_text(json.dumps({"wrong": wrong, "compared": compared}))


if __name__ == "__main__":
    main()
