"""When a run is saved, and what is noted of the cost."""

import math

import pytest
import torch
from tests.train.toy import Log, ToyData, counting, toy_config, toy_model

from warploom.checkpoint.format import CheckpointState, list_checkpoints
from warploom.train import saving
from warploom.train.run_state import Progress
from warploom.train.saving import RunSaver, save_interval
from warploom.train.trainer import Trainer


class Clock:
    """Time that goes on when it is told to; of the processor there is write_s for every save."""

    def __init__(self, write_s):
        self.now, self.write_s, self._asked = 100.0, write_s, 0

    def perf_counter(self):
        return self.now

    def thread_time(self):
        self._asked += 1
        return self.write_s * (self._asked // 2)  # asked before and after each


@pytest.mark.parametrize(("cost_s", "fault_every_s"), [(0.02, 60.0), (0.5, 300.0), (3.0, 36_000.0)])
def test_no_other_interval_loses_less(cost_s, fault_every_s):
    def lost(interval_s):  # a second: saves, and half an interval for each fault
        return cost_s / interval_s + interval_s / 2 / fault_every_s

    best = save_interval(cost_s, fault_every_s)
    assert all(lost(best) < lost(best * factor) for factor in (0.5, 0.9, 1.1, 2.0))


def test_a_save_is_due_after_the_interval_that_the_saves_before_ask_for(tmp_path, monkeypatch):
    clock = Clock(write_s=0.5)
    monkeypatch.setattr(saving, "time", clock)
    progress = Progress(num_steps=100, micro_batch_size=1)
    state = CheckpointState(step=0, weights={"w": torch.zeros(3)}, optimizer={}, meta={}, rng={})

    def capture():
        clock.now += 0.125  # the steps wait for the copy
        state.step = progress.step
        return state

    config = toy_config(tmp_path, fault_every_s=50.0)
    log = Log()
    saver = RunSaver(config, capture, progress, log)
    assert saver.is_due  # the first shows what it takes
    progress.step = 1
    saver.save()
    saver.collect()
    # The stall alone, since what the first took to write is known after it: sqrt(2 * 0.125 * 50) = 3.54.
    clock.now = 100.0 + 3.5
    assert not saver.is_due
    clock.now = 100.0 + 3.6
    assert saver.is_due
    for step in range(2, 9):
        progress.step = step
        saver.save()
        saver.collect()
    # Now with 0.5 s for writing: sqrt(2 * 0.625 * 50) = 7.91.
    begun = clock.now - 0.125
    clock.now = begun + 7.8
    assert not saver.is_due
    clock.now = begun + 8.0
    assert saver.is_due
    assert [record.step for record in log.saves] == list(range(1, 9))
    assert all(math.isclose(record.stall_s, 0.125) for record in log.saves)
    saver.finish()
    assert not RunSaver(toy_config(tmp_path), capture, progress, log).is_due  # without faults to expect, never


@pytest.mark.parametrize("fault_every_s", [0.0, 1e-9])
def test_a_run_is_saved_as_its_faults_ask(tmp_path, fault_every_s):
    config = toy_config(
        tmp_path, steps=6, save_every=100, eval_every=100, keep_best=0, keep_last=9, fault_every_s=fault_every_s
    )
    log = Log()
    Trainer(toy_model(config), ToyData(counting), config, monitor=log).fit()
    kept = [path.name for path in list_checkpoints(tmp_path)]
    # A fault in every nanosecond wants a save after each step, or as soon as the one before is written.
    assert len(kept) > 1 if fault_every_s else kept == ["step-00000006"]
    assert len(log.saves) == len(kept) - 1
