"""Training runs that stop and go on, on one number of replicas or changing ones, for test_resume.py."""

import os
import signal
import sys
from pathlib import Path

import torch
from tests.parallel.forked import Forks, main
from tests.train.toy import Log, ToyData, ragged, toy_config, toy_model

from warploom.checkpoint import list_checkpoints
from warploom.ops.linear import PackedWeight
from warploom.parallel import ParallelConfig, tree
from warploom.parallel.apply import Parallelize
from warploom.parallel.mesh import Mesh
from warploom.train import matmul_rate, run_state, trainer
from warploom.train.config import RunConfig
from warploom.train.trainer import Trainer


class WholeBatches(ToyData):
    """The same rows, however many are read at a time: row i is number i."""

    def train_batches(self, micro_batch_size):
        return Rows(micro_batch_size)

    def heldout_batches(self, micro_batch_size):
        stream = Rows(micro_batch_size, seed=2)
        return [next(stream) for _ in range(8 // micro_batch_size)]


class Rows:
    def __init__(self, batch_size, seed=1):
        self.batch_size, self.seed, self.position = batch_size, seed, 0

    def __next__(self):
        rows = range(self.position, self.position + self.batch_size)
        self.position = rows.stop
        made = [ragged(1, torch.Generator().manual_seed(1000 * self.seed + row)) for row in rows]
        tensors = (torch.cat([getattr(batch, name) for batch in made]) for name in ("tokens", "targets"))
        return type(made[0])(*tensors)

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def forget_on(rank):
    """Skip the restoring of the random states of one process; the check of it is skipped too unless it is kept."""
    true_restore = run_state.rng.restore
    run_state.rng.restore = lambda *states: [] if torch.distributed.get_rank() == rank else true_restore(*states)


def uncheck():
    run_state._check_random_states = lambda path, state, parallel: []


def packed_once(self, weight, dtype, fresh=PackedWeight.panels):
    """What the first use packed, whatever has become of the weight."""
    if self._panels is None:
        self.first = fresh(self, weight, dtype).clone()
    return self.first


PLANTED = {
    None: lambda: None,
    "rank 1 forgets": lambda: (forget_on(1), uncheck()),
    "rank 1 forgets, checked": lambda: forget_on(1),
    "unbalanced": lambda: setattr(tree, "_middle", lambda start, stop: start + 1),
    "ring": lambda: setattr(tree, "_tree_sum", lambda parts: sum(parts[1:], parts[0])),
    "packs at each use": lambda: setattr(trainer, "keep_packed", lambda model: {}),
    "stale": lambda: setattr(PackedWeight, "panels", packed_once),
    "unseeded": lambda: setattr(tree.torch, "manual_seed", lambda seed: None),
}


matmul_rate.measure = lambda dtype, device: 1e9  # it takes longer than the runs, and nothing here reads it


def train(rank, size, out_dir, until, settings, planted, parallel):
    settings = {"micro_batch_size": 1, "eval_every": 4, "save_every": 100, "keep_best": 0, **settings}
    config = toy_config(Path(out_dir), steps=12, optimizer={"name": settings.pop("optimizer", "adamw")}, **settings)
    sizes = ParallelConfig(**parallel).resolve(size)
    config = RunConfig(config.model, config.train, config.optimizer, config.schedule, sizes)
    parallelize = None
    if size > 1:
        parallelize = Parallelize(Mesh(sizes, "cpu"))
    PLANTED[planted]()
    log = Log()
    log.step = lambda record: os.kill(os.getpid(), signal.SIGTERM) if record.step == until else None
    result = Trainer(toy_model(config), WholeBatches(ragged), config, monitor=log, parallelize=parallelize).fit()
    # Processes tell each other of a signal with the sums of a step: one that comes after them is heard a step later.
    assert until <= result.steps <= until + 1, result


def run(out_dir, phases, settings, planted=None):
    """Train in phases, [processes, last step, layout] each. Return the last checkpoint, or the error that ended it."""
    for size, until, parallel in phases:
        arguments = (size, out_dir, until, settings, planted, parallel)
        children = Forks(size, lambda rank, arguments=arguments: train(rank, *arguments))
        codes = children.wait()
        if any(codes):
            return {"codes": codes, "errors": [children.error(rank) for rank in range(size)]}
    return {"checkpoint": str(list_checkpoints(out_dir)[0])}


if __name__ == "__main__":
    main({"run": run}, sys.argv[1:])
