"""Training runs that are killed and resumed, for test_resume.py: killed_run.py JOBS(json).

Every attempt at a run is a forked child, so that torch is imported once. A job's first "kills" attempts die by SIGKILL,
in turn: at a random time, and at a random fsync or rename inside a save. The last line of output is JSON: for each job,
how its attempts ended.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

from tests.train.toy import Log, toy_config, toy_model

from warploom.checkpoint import rng, save
from warploom.data.shards import TokenDataset
from warploom.train import run_state
from warploom.train.trainer import Trainer


def train(job):
    data = TokenDataset(job["tokens"])
    config = toy_config(Path(job["out_dir"]), vocab_size=data.tokenizer.vocab_size, **job["settings"])
    monitor = Log()
    if job["flag"] == "forgetful":
        rng.restore = lambda tensors, scalars: []
        run_state._check_random_states = lambda path, state, parallel: []
    if job["flag"] == "two signals":
        monitor.step = lambda record: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]
    Trainer(toy_model(config), data, config, tokenizer=data.tokenizer, monitor=monitor).fit()


def die_inside_a_save(at):
    """Arrange for SIGKILL at the at-th call by which a checkpoint reaches the disk."""
    calls = 0

    def counted(call):
        def wrapper(*arguments):
            nonlocal calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments)

        return wrapper

    save._fsync, save._rename = counted(save._fsync), counted(save._rename)


def attempt(number, chance, job):
    """Return the wait status of one child."""
    kill, in_save = number < job["kills"], number % 2
    at_call, after_s = chance.randint(1, 40), chance.uniform(0.02, 0.6)
    while signal.sigtimedwait([signal.SIGCHLD], 0):  # of children waited for already
        pass
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if kill and in_save:
                die_inside_a_save(at_call)
            train(job)
            code = 0
        finally:
            os._exit(code)
    if kill and not in_save and signal.sigtimedwait([signal.SIGCHLD], after_s) is None:
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def run(job):
    chance = random.Random(job["seed"])
    ends = []
    while not ends or ends[-1]["exit"] == -signal.SIGKILL:
        code = os.waitstatus_to_exitcode(attempt(len(ends), chance, job))
        left_over = any(path.name.startswith(".tmp-") for path in Path(job["out_dir"]).glob(".*"))
        ends.append({"exit": code, "in_save": left_over})
    return ends


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    print(json.dumps([run(job) for job in json.loads(sys.argv[1])]))
