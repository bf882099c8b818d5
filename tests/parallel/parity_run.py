"""The processes of a parity check, argv[3] of them: they train models over the layouts that argv[1], a file of cases,
names, and write what differs from the training in one process into the folder argv[2], a file per rank."""

import functools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tests.parallel.forked import Forks

from warploom.models.config import TransformerConfig
from warploom.models.transformer import Transformer
from warploom.optim import OptimizerConfig, build_optimizers
from warploom.optim.parts import local_part
from warploom.parallel.apply import ParallelModel
from warploom.parallel.config import ParallelConfig
from warploom.parallel.mesh import Mesh
from warploom.train.step import training_step

STEPS = 20
TIMEOUT_S = 560.0
SMALLEST = 1e-3  # a third of the learning rate; weights begin at 0.02
SMALL = {"d_model": 32, "num_layers": 4, "num_heads": 4, "max_seq_len": 16, "vocab_size": 61}


class Batch:
    def __init__(self, **tensors):
        self.__dict__.update(tensors)


def batches(case, config):
    """The global batches of all steps: ragged targets, so that no two rows weigh the same."""
    generator = torch.Generator().manual_seed(7)
    B, T = case.get("batch_size", 8), 16

    def draw(*shape):
        return torch.randint(config.vocab_size, shape, generator=generator)

    for _ in range(STEPS):
        tokens = draw(B, T + 1)
        batch = {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}
        ends = torch.randint(4, T + 1, (B, 1), generator=generator)
        batch["targets"] = batch["targets"].masked_fill(torch.arange(T) >= ends, -100)
        if config.architecture == "encoder-decoder":
            S = case.get("src_len", 12)
            batch["source"] = draw(B, S)
            batch["source_lengths"] = torch.randint(3, S + 1, (B,), generator=generator)
        elif case.get("packed"):
            cuts = torch.randint(1, T, (B,), generator=generator)
            positions = torch.arange(T) - torch.where(torch.arange(T) >= cuts[:, None], cuts[:, None], 0)
            offsets = torch.stack((torch.arange(B) * T, torch.arange(B) * T + cuts), 1).reshape(-1)
            batch |= {"positions": positions, "cu_seqlens": torch.cat((offsets, torch.tensor([B * T]))).int()}
        yield Batch(**batch)


def build(case):
    torch.manual_seed(3)
    config = TransformerConfig(**{**SMALL, **case.get("model", {})})
    model = Transformer(config)
    if case.get("dtype", "float64") == "float64":
        model.double()
        model.compute_dtype = torch.float64
    return config, model


def train(case, config, model, optimizers, parameters, **arguments):
    losses = []
    for batch in batches(case, config):
        micro_batches = [batch]
        if case.get("rows"):  # one process alone: so many at a time
            split = {name: x.split(case["rows"]) for name, x in vars(batch).items()}
            micro_batches = [
                Batch(**dict(zip(split, parts, strict=True))) for parts in zip(*split.values(), strict=True)
            ]
        outcome = training_step(model.loss_sum, micro_batches, parameters, optimizers, grad_clip=1.0, **arguments)
        losses.append((outcome.loss, outcome.grad_norm))
    return losses


class PlainSGD:
    """p -= lr g, which passes the rounding of g on as it is."""

    def __init__(self, parameters, lr):
        self.parameters, self.lr = parameters, lr

    @torch.no_grad()
    def step(self, closure=None, *, grad_factor=1.0):
        for parameter in self.parameters:
            if parameter.grad is not None:
                local_part(parameter).add_(local_part(parameter.grad), alpha=-self.lr * grad_factor)


def optimizers_of(case, module, dtype, **arguments):
    name = case.get("optimizer", "adamw")
    if name == "sgd":
        return [PlainSGD(list(module.parameters()), case.get("lr", 0.5))]
    # Adam divides by the size of a gradient, so where that is near zero its rounding becomes the update: in float32
    # eps bounds by how much (test_rounding.py). float64 shows the usual eps.
    config = OptimizerConfig(name=name, lr=3e-3, muon_lr=3e-3, eps=case.get("eps", 1e-8))
    return build_optimizers(module, config, muon_dtype=dtype, **arguments)


def alone(case):
    config, model = build(case)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 + case.get("nudge", 0.0) * torch.randn_like(parameter).sign()
    model.loss_sum = functools.partial(model.loss, reduction="sum")
    losses = train(case, config, model, optimizers_of(case, model, model.compute_dtype), list(model.parameters()))
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def together(case):
    config, model = build(case)
    sizes = ParallelConfig(**case["parallel"]).resolve(dist.get_world_size())
    sizes.check_model(config, 16)
    parallel = ParallelModel(model, Mesh(sizes, "cpu"), case.get("micro_batch_size", 2))
    optimizers = optimizers_of(case, parallel.module, model.compute_dtype, exchange=parallel.matrices)
    losses = train(case, config, parallel, optimizers, parallel.parameters, processes=parallel)
    return losses, parallel


def difference(case, references):
    key = json.dumps({name: value for name, value in case.items() if name not in ("parallel", "micro_batch_size")})
    if key not in references:
        if dist.get_rank() == 0:
            losses, weights = alone(case)
        else:
            losses, weights = [], {name: p.detach() for name, p in build(case)[1].named_parameters()}
        numbers = torch.tensor(losses or [(0.0, 0.0)] * STEPS, dtype=torch.float64)
        for tensor in (numbers, *weights.values()):
            dist.broadcast(tensor, 0)
        references[key] = numbers, weights
    numbers, weights = references[key]
    losses, parallel = together(case)
    relative = (torch.tensor(losses, dtype=torch.float64) - numbers).abs() / numbers.abs()
    found = {"losses": relative[:, 0].max().item(), "norms": relative[:, 1].max().item(), "weights": 0.0}
    compared = 0
    for name, parameter in parallel.named:
        here = local_part(parameter.detach())
        expected = parallel.part(name).of(weights[name])
        assert here.shape == expected.shape, (name, here.shape, expected.shape)
        compared += here.numel()
        if here.numel():
            # A bias on keys, which the softmax takes out again, stays at rounding: its own size is no measure.
            size = max(weights[name].abs().max().item(), SMALLEST)
            error = (here - expected).abs().max().item() / size
            if error > found["weights"]:
                found |= {"weights": error, "worst": name}
    return {**found, "compared": compared}


def main():
    cases, folder, size = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)

    def work(rank):
        references = {}
        results = {name: difference(case, references) for name, case in cases.items()}
        (folder / f"{rank}.json").write_text(json.dumps(results))

    children = Forks(size, work, group_timeout_s=TIMEOUT_S)
    if any(children.wait(TIMEOUT_S)):
        sys.exit("\n".join(children.error(rank) for rank in range(size)))


if __name__ == "__main__":
    main()
