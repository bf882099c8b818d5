"""Interrupted runs: the same bits as one that was not interrupted, however it was interrupted."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.train.toy import ToyData, counting, toy_model

from warploom.train.trainer import Trainer

HERE = Path(__file__).parent
STATE_FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")


class Log:
    """A monitor that keeps what it is told."""

    def __init__(self):
        self.steps, self.evaluations, self.messages, self.results, self.is_closed = [], [], [], [], False

    def start(self, info):
        self.info = info

    def step(self, record):
        self.steps.append(record)

    def evaluation(self, record):
        self.evaluations.append(record)

    def message(self, text):
        self.messages.append(text)

    def finish(self, result):
        self.results.append(result)

    def close(self):
        self.is_closed = True


def fit(config, data=None, monitor=None):
    trainer = Trainer(toy_model(config), data or ToyData(counting), config, monitor=monitor)
    return trainer.fit(), trainer


def bytes_of(checkpoint):
    return {name: (checkpoint / name).read_bytes() for name in STATE_FILES}


def run_script(*arguments):
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    command = [sys.executable, str(HERE / "killed_run.py"), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("name", "dtype"), [("adamw", "bf16"), ("muon", "fp32")])
def test_a_run_killed_many_times_ends_with_the_same_bits(tmp_path, tokens, name, dtype):
    kills = 8
    settings = {"steps": 16, "save_every": 2, "eval_every": 4, "dtype": dtype, "optimizer": {"name": name}}
    one_go = run_script(tmp_path / "one", tokens, json.dumps(settings), 0, 0)
    killed = run_script(tmp_path / "killed", tokens, json.dumps(settings), kills, 5)
    assert [end["exit"] for end in one_go] == [0]
    # The faults fired: SIGKILL ended every attempt but the last, and some of them in the middle of a save.
    assert len(killed) >= 4 and all(end["signal"] == signal.SIGKILL for end in killed[:-1])
    assert sum(end["in_save"] for end in killed) >= 2
    assert bytes_of(tmp_path / "killed/step-00000016") == bytes_of(tmp_path / "one/step-00000016")

    # Control: the comparison sees a random state that is not restored.
    forgetful = run_script(tmp_path / "forgetful", tokens, json.dumps(settings), kills, 5, "--forget-rng")
    assert len(forgetful) > 1
    different, same = (bytes_of(tmp_path / run / "step-00000016") for run in ("forgetful", "one"))
    assert different["model.safetensors"] != same["model.safetensors"]
