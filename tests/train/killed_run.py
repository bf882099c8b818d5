"""A training run for test_resume.py, many times over: killed_run.py OUT_DIR TOKENS SETTINGS(json) KILLS SEED [--forget-rng]

Every attempt is a forked child, so that torch is imported once. The first KILLS attempts die by SIGKILL, in turn: at a
random time, and at a random fsync or rename inside a save. The last line of output is JSON: how each attempt ended.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

from tests.train.toy import toy_config, toy_model

from warploom.checkpoint import rng, save
from warploom.data.shards import TokenDataset
from warploom.train.trainer import Trainer


def train(out_dir, tokens, settings):
    data = TokenDataset(tokens)
    config = toy_config(out_dir, vocab_size=data.tokenizer.vocab_size, **settings)
    Trainer(toy_model(config), data, config, tokenizer=data.tokenizer).fit()


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


def attempt(number, chance, out_dir, tokens, settings, kills):
    """Return the wait status of one child."""
    in_save, at_call, after_s = number % 2, chance.randint(1, 40), chance.uniform(0.02, 0.6)
    while signal.sigtimedwait([signal.SIGCHLD], 0):  # of children waited for already
        pass
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if number < kills and in_save:
                die_inside_a_save(at_call)
            train(out_dir, tokens, settings)
            code = 0
        finally:
            os._exit(code)
    if number < kills and not in_save and signal.sigtimedwait([signal.SIGCHLD], after_s) is None:
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def main(out_dir, tokens, settings, kills, seed, *flags):
    if "--forget-rng" in flags:
        rng.restore = lambda tensors, scalars: []
    chance = random.Random(int(seed))
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    ends = []
    while not ends or ends[-1]["signal"]:
        status = attempt(len(ends), chance, Path(out_dir), tokens, json.loads(settings), int(kills))
        in_save = any(path.name.startswith(".tmp-") for path in Path(out_dir).glob(".*"))
        ends.append({"signal": status & 0x7F, "exit": os.waitstatus_to_exitcode(status), "in_save": in_save})
    print(json.dumps(ends))


if __name__ == "__main__":
    main(*sys.argv[1:])
