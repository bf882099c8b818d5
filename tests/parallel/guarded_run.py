"""One process of the tests of what one process has to tell all: that a step is not finite or a spike, that it computed
other bits than before, that a signal came. Start with torch.distributed.run; argv[1] is a folder for the runs and one
result file per rank."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash
from tests.train.toy import Log, ToyData, counting, toy_config, toy_model

from warploom.checkpoint import list_checkpoints
from warploom.optim.parts import local_part
from warploom.parallel.apply import Parallelize, ParallelModel
from warploom.parallel.config import ParallelConfig
from warploom.parallel.mesh import Mesh, processes
from warploom.train import guard, trainer
from warploom.train.corruption import CorruptionFound
from warploom.train.trainer import Trainer

LAYOUTS = {"data": {"data": 2}, "shard": {"shard": 2}, "tensor": {"tensor": 2}, "pipeline": {"pipeline": 2}}
ELASTIC = {"data": 2}
SPIKED = ("data", "pipeline")
POISONED = (5, 9, 10, 11)
SPIKES = (7, 9)
CHECK_EVERY = 3
FLIPPED = 6  # a step that is checked
STEPS = 14


class Poisoned(ParallelModel):
    """Where a gradient is not finite on the last process alone, after all that is exchanged was exchanged; or much too
    large on the first."""

    steps = 0
    poisoned: tuple[int, ...] = ()
    spikes: tuple[int, ...] = ()

    def accumulate(self, *arguments):
        loss = super().accumulate(*arguments)
        self.steps += 1
        grads = [local_part(p.grad) for p in self.parameters if p.grad is not None]
        if self.steps in self.poisoned and dist.get_rank() == dist.get_world_size() - 1:
            # The smallest: where the tensor axis cuts, one that it does not cut, whose norm is counted elsewhere.
            min((grad for grad in grads if grad.numel()), key=torch.numel).view(-1)[-1] = float("inf")
        if self.steps in self.spikes and dist.get_rank() == 0:
            torch._foreach_mul_(grads, 1e4)
        return loss


class Watched(Trainer):
    """Keeps what each step did, and flips a bit on the last process if flips is set: of a "gradient" of step FLIPPED,
    the first time it is computed, or of a "weight" before the step that comes before."""

    flips = None
    has_flipped = False

    def _set_up(self):
        super()._set_up()
        for name, module in self._module.named_modules():
            if name.endswith("stack.norm"):
                module.register_forward_hook(self._flip_gradient)

    def _flip_gradient(self, module, inputs, outputs):
        is_here = self.progress.step == FLIPPED - 1 and dist.get_rank() == dist.get_world_size() - 1
        if self.flips == "gradient" and is_here and not self.has_flipped:
            self.has_flipped = True
            outputs[0].register_hook(flipped)

    def _step(self):
        is_last = dist.get_rank() == dist.get_world_size() - 1
        if self.flips == "weight" and self.progress.step == FLIPPED - 2 and is_last:
            self.has_flipped = True
            weight = local_part(self._parameters[-1].data)
            weight.copy_(flipped(weight))
        before = digest(self)
        super()._step()
        history = self.__dict__.setdefault("history", [])
        history.append([self.progress.step, self.progress.skipped_steps, before, digest(self)])


def flipped(tensor):
    """The same with one bit of its first number flipped: the largest of the mantissa."""
    copy = tensor.clone()
    copy.view(torch.int32).view(-1)[0] ^= 1 << 22
    return copy


def digest(trainer):
    """Of every bit of weights and optimizer states on this process."""
    found = xxhash.xxh3_128()
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                values = [parameter, *(state[key] for key in sorted(state))]
                for value in values:
                    if isinstance(value, torch.Tensor):
                        value = local_part(value.detach()).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                    found.update(value if isinstance(value, bytes) else repr(value).encode())
    return found.hexdigest()


def train(folder, sizes, poisoned=(), spikes=(), flips=None, **settings):
    mesh = Mesh(ParallelConfig(**sizes).resolve(dist.get_world_size()), "cpu")

    class Parallelized(Parallelize):
        def __call__(self, model, micro_batch_size, **arguments):
            parallel = Poisoned(model, self.mesh, micro_batch_size, **arguments)
            parallel.poisoned, parallel.spikes = poisoned, spikes
            return parallel

    settings = {"steps": STEPS, "save_every": 4, "eval_every": 100, "keep_best": 0, **settings}
    config = toy_config(folder, model={"dropout": 0.0}, **settings)
    log = Log()
    trainer = Watched(
        toy_model(config),
        ToyData(counting),
        config,
        monitor=log if dist.get_rank() == 0 else None,
        parallelize=Parallelized(mesh),
    )
    trainer.flips = flips
    try:
        result = trainer.fit()
    except CorruptionFound as error:
        kept = [path.name for path in list_checkpoints(folder)]
        return {"error": str(error), "flipped": trainer.has_flipped, "kept": kept}
    return {
        "history": trainer.history,
        "steps": result.steps,
        "skipped": result.skipped_steps,
        "rewinds": trainer.progress.rewinds,
        "records": [[r.step, r.num_sequences, r.position] for r in log.skips],
        "why": [record.why for record in log.skips],
        "messages": log.messages,
    }


class Signalled(ParallelModel):
    """Where SIGTERM comes to the last process in the second of two micro batches of step 7."""

    calls = 0

    def loss_sum(self, *arguments, **inputs):
        self.calls += 1
        if self.calls == 13 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss_sum(*arguments, **inputs)


def stop_in_a_step(folder, sizes, grace_s):
    """Stop a run by that signal, go on, and compare with one that was not stopped."""
    guard.GRACE_S = grace_s
    mesh = Mesh(ParallelConfig(**sizes).resolve(dist.get_world_size()), "cpu")

    def fit(name, model_class):
        class Parallelized(Parallelize):
            def __call__(self, model, micro_batch_size):
                return model_class(model, self.mesh, micro_batch_size)

        rows = 8 // mesh.num_parts // 2
        config = toy_config(folder / name, steps=10, save_every=100, eval_every=100, micro_batch_size=rows)
        trainer = Trainer(toy_model(config), ToyData(counting), config, parallelize=Parallelized(mesh))
        return trainer.fit(), digest(trainer)

    stopped, _ = fit("stopped", Signalled)
    resumed, digest_resumed = fit("stopped", ParallelModel)
    _, digest_straight = fit("straight", ParallelModel)
    return {
        "steps": stopped.steps,
        "signal": stopped.stop_signal,
        "resumed": resumed.steps,
        "equal": digest_resumed == digest_straight,
    }


def main():
    folder = Path(sys.argv[1])
    guard.LONG_STEP_S = trainer.LONG_STEP_S = 0.0  # each step counts as long
    torch.set_num_threads(1)
    with processes("cpu", timeout_s=120.0):
        results = {
            name: {
                kind: train(folder / name / kind, sizes, **settings)
                for kind, settings in RUNS.items()
                if kind != "spiked" or name in SPIKED
            }
            for name, sizes in LAYOUTS.items()
        }
        results["elastic"] = {
            kind: train(folder / "elastic" / kind, ELASTIC, deterministic="elastic", **RUNS[kind])
            for kind in ("control", "flipped")
        }
        results["data"]["unlike"] = train(folder / "data" / "unlike", LAYOUTS["data"], **UNLIKE)
        results["signal"] = {
            f"{name}, {grace_s}": stop_in_a_step(folder / f"{name}-{grace_s}", LAYOUTS[name], grace_s)
            for name, grace_s in (("data", 0), ("shard", 0), ("tensor", 0), ("shard", 60))
        }
        trainer.LONG_STEP_S = 1000.0  # none does
        results["signal"]["data, short"] = stop_in_a_step(folder / "data-short", LAYOUTS["data"], 0)
        (folder / f"{dist.get_rank()}.json").write_text(json.dumps(results))
        dist.barrier()


RUNS = {
    "poisoned": {"poisoned": POISONED},
    "spiked": {"spikes": SPIKES, "on_spike": "skip", "spike_window": 4, "steps": 10},
    "flipped": {"flips": "gradient", "sdc_check_every": CHECK_EVERY},
    "control": {"sdc_check_every": CHECK_EVERY, "on_spike": "skip", "spike_window": 4},
}
UNLIKE = {"flips": "weight", "sdc_check_every": CHECK_EVERY}

if __name__ == "__main__":
    main()
