"""Interrupted runs: the same bits as one that was not interrupted, however it was interrupted."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tests.train.toy import Log, ToyData, counting, toy_config, toy_model

from warploom.checkpoint import list_checkpoints, load_checkpoint, rng
from warploom.checkpoint.format import step_of
from warploom.errors import UserError
from warploom.train import guard, saving
from warploom.train.trainer import Trainer

STATE_FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")


def fit(config, data=None, monitor=None):
    trainer = Trainer(toy_model(config), data or ToyData(counting), config, monitor=monitor)
    return trainer.fit(), trainer


def bytes_of(checkpoint):
    return {name: (checkpoint / name).read_bytes() for name in STATE_FILES}


RUNS = {"adamw": ("adamw", "bf16"), "muon": ("muon", "fp32")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokens):
    """Each run in one go and with kills, and what the other tests need, by name: folder and ends of the attempts."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = {}
    for name, (optimizer, dtype) in RUNS.items():
        settings = {"steps": 16, "save_every": 2, "eval_every": 4, "dtype": dtype, "optimizer": {"name": optimizer}}
        for kind, kills in (("one go", 0), ("killed", 8), ("forgetful", 2)):
            jobs[name, kind] = {"settings": settings, "kills": kills, "flag": kind}
    del jobs["muon", "forgetful"]
    jobs["two signals"] = {"settings": {"steps": 4}, "kills": 0, "flag": "two signals"}
    for number, job in enumerate(jobs.values()):
        job |= {"seed": 5, "tokens": str(tokens), "out_dir": str(folder / str(number))}
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    command = [sys.executable, str(Path(__file__).with_name("killed_run.py")), json.dumps(list(jobs.values()))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout.splitlines()[-1])
    return {key: (Path(job["out_dir"]), end) for (key, job), end in zip(jobs.items(), ends, strict=True)}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_many_times_ends_with_the_same_bits(runs, name):
    (one, one_ends), (killed, ends) = runs[name, "one go"], runs[name, "killed"]
    assert [end["exit"] for end in one_ends] == [0]
    # The faults fired: SIGKILL ended every attempt but the last, and some of them in the middle of a save.
    assert len(ends) >= 4 and ends[-1]["exit"] == 0 and {end["exit"] for end in ends[:-1]} == {-signal.SIGKILL}
    assert sum(end["in_save"] for end in ends) >= 2
    assert bytes_of(killed / "step-00000016") == bytes_of(one / "step-00000016")


def test_the_comparison_sees_a_random_state_that_is_not_restored(runs):
    (one, _), (forgetful, ends) = runs["adamw", "one go"], runs["adamw", "forgetful"]
    assert len(ends) > 1 and ends[-1]["exit"] == 0
    assert (
        bytes_of(forgetful / "step-00000016")["model.safetensors"]
        != bytes_of(one / "step-00000016")["model.safetensors"]
    )


@pytest.mark.parametrize("broken", ["capture", "restore"])
def test_a_random_state_that_does_not_come_back_is_refused(tmp_path, monkeypatch, broken):
    config = toy_config(tmp_path, steps=2)
    if broken == "capture":
        with monkeypatch.context() as patch:
            patch.setattr(rng, "digest", lambda: "that of other states")
            fit(config)
    else:
        fit(config)
        monkeypatch.setattr(rng, "restore", lambda tensors, scalars: [])
    with pytest.raises(UserError, match="process 0 did not get back the random states that it saved"):
        fit(toy_config(tmp_path, steps=3))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_a_checkpoint_from_which_it_goes_on_bit_for_bit(tmp_path, number):
    config = toy_config(tmp_path / "stopped", steps=12, save_every=100, eval_every=5)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    log = Log()
    log.step = lambda record: os.kill(os.getpid(), number) if record.step == 7 else None
    stopped, _ = fit(config, monitor=log)
    assert (stopped.steps, stopped.stop_signal) == (7, number)
    assert stopped.stopped_because == f"{number.name} received"
    assert stopped.checkpoint == list_checkpoints(config.train.out_dir)[0] == config.train.out_dir / "step-00000007"
    assert log.results == [stopped] and log.is_closed
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers

    resumed, _ = fit(config)
    straight, _ = fit(toy_config(tmp_path / "straight", steps=12, save_every=100, eval_every=5))
    assert (resumed.steps, resumed.stop_signal) == (12, None) and resumed.heldout_loss == straight.heldout_loss
    assert bytes_of(resumed.checkpoint) == bytes_of(straight.checkpoint)


def test_a_signal_during_an_evaluation_repeats_it_after_resuming(tmp_path):
    class Interrupting(ToyData):
        def heldout_batches(self, micro_batch_size):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().heldout_batches(micro_batch_size)

    config = toy_config(tmp_path, steps=12, eval_every=6)
    stopped, trainer = fit(config, data=Interrupting(counting))
    assert stopped.steps == 6 and trainer.progress.curve == [] and stopped.stop_signal == signal.SIGTERM
    resumed, trainer = fit(config)
    assert [record["step"] for record in trainer.progress.curve] == [6, 12]
    straight, _ = fit(toy_config(tmp_path / "straight", steps=12, eval_every=6))
    assert bytes_of(resumed.checkpoint) == bytes_of(straight.checkpoint)


def test_a_step_that_does_not_end_after_a_signal_is_given_up_and_made_again_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "GRACE_S", 0.0)
    monkeypatch.setattr("warploom.train.trainer.LONG_STEP_S", 0.0)
    config = toy_config(tmp_path / "stopped", steps=12, save_every=100)
    model, calls = toy_model(config), []
    true_loss = model.loss

    def loss(*arguments, **named):
        calls.append(1)
        if len(calls) == 13:  # the first of two micro batches of step 7
            os.kill(os.getpid(), signal.SIGTERM)
        return true_loss(*arguments, **named)

    model.loss = loss
    stopped = Trainer(model, ToyData(counting), config).fit()
    assert (stopped.steps, stopped.stop_signal, len(calls)) == (6, signal.SIGTERM, 13)
    resumed, _ = fit(config)
    straight, _ = fit(toy_config(tmp_path / "straight", steps=12, save_every=100))
    assert bytes_of(resumed.checkpoint) == bytes_of(straight.checkpoint)

    # Control: with time to end, the step ends.
    monkeypatch.setattr(guard, "GRACE_S", 60.0)
    calls.clear()
    config = toy_config(tmp_path / "control", steps=12, save_every=100)
    assert Trainer(model, ToyData(counting), config).fit().steps == 7


def test_a_second_signal_kills_at_once(runs):
    folder, ends = runs["two signals"]
    assert [end["exit"] for end in ends] == [-signal.SIGTERM]
    assert list_checkpoints(folder) == []  # the first signal's checkpoint was not waited for


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_message(tmp_path):
    config = toy_config(tmp_path / "run", steps=12, save_every=4, keep_last=3, keep_best=0)
    straight, _ = fit(config)
    expected = bytes_of(straight.checkpoint)
    weights = straight.checkpoint / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-9] ^= 0x10
    weights.write_bytes(damaged)
    log = Log()
    resumed, _ = fit(config, monitor=log)
    assert log.info.start_step == 8
    assert re.search(r"step-00000012 is damaged: model.safetensors: tensor '.+' does not match", log.messages[0])
    assert "Going on from step 8" in log.messages[1]
    assert bytes_of(resumed.checkpoint) == expected

    # Control: with nothing damaged the finished run is only opened.
    log = Log()
    assert fit(config, monitor=log)[0].steps == 12
    assert log.steps == [] and "Going on from step 12" in log.messages[0]


def test_another_run_in_the_folder_is_refused_with_the_settings_that_differ(tmp_path):
    fit(toy_config(tmp_path, steps=2))
    with pytest.raises(UserError, match="model.d_model: 32 in the checkpoint, 64 now"):
        fit(toy_config(tmp_path, steps=2, model={"d_model": 64}))
    with pytest.raises(UserError, match="optimizer.name: 'adamw' in the checkpoint, 'muon' now"):
        fit(toy_config(tmp_path, steps=2, optimizer={"name": "muon"}))
    with pytest.raises(UserError, match="already holds step-00000002.*'never'"):
        fit(toy_config(tmp_path, steps=2, resume="never"))


def test_changed_settings_that_may_change_are_said_and_win(tmp_path):
    fit(toy_config(tmp_path, steps=4))
    log = Log()
    changed = toy_config(tmp_path, steps=6, optimizer={"lr": 1e-4}, schedule={"kind": "constant", "warmup_steps": 0})
    result, _ = fit(changed, monitor=log)
    assert result.steps == 6 and [record.lr for record in log.steps] == [1e-4, 1e-4]
    assert "Changed since then: optimizer.lr: 0.003 in the checkpoint, 0.0001 now." in log.messages
    assert "Changed since then: train.steps: 4 in the checkpoint, 6 now." in log.messages


def test_a_run_can_go_on_from_a_named_checkpoint_of_another_folder(tmp_path):
    first, _ = fit(toy_config(tmp_path / "first", steps=4))
    log = Log()
    onward, _ = fit(toy_config(tmp_path / "second", steps=6, resume=str(first.checkpoint)), monitor=log)
    assert log.info.start_step == 4 and onward.checkpoint == tmp_path / "second/step-00000006"
    with pytest.raises(UserError, match="no checkpoint at .*nowhere"):
        fit(toy_config(tmp_path / "third", resume=str(tmp_path / "nowhere")))


def test_the_tokenizer_lies_in_the_checkpoint(runs, tokens):
    state = load_checkpoint(runs["muon", "one go"][0] / "step-00000016")
    assert state.tokenizer == (tokens / "tokenizer.json").read_bytes()
    assert state.meta["loader"]["epoch"] >= 0 and state.step == 16


@pytest.mark.parametrize("in_background", [True, False])
def test_steps_go_on_while_a_checkpoint_is_written(tmp_path, monkeypatch, in_background):
    """The write of step 4 lasts until step 6 is done; what it holds is step 4 all the same."""
    go_on, was_free = threading.Event(), []
    true_save = saving.save_checkpoint

    def save_checkpoint(run_dir, state):
        if state.step == 4:
            was_free.append(go_on.wait(30 if in_background else 0.1))
        return true_save(run_dir, state)

    monkeypatch.setattr(saving, "save_checkpoint", save_checkpoint)
    log = Log()
    log.step = lambda record: go_on.set() if record.step == 6 else None
    arguments = {"steps": 8, "eval_every": 100, "keep_best": 0, "keep_last": 9}
    config = toy_config(tmp_path / "slow", save_every=4, save_in_background=in_background, **arguments)
    fit(config, monitor=log)
    assert was_free == [in_background]  # in the background step 6 came while step 4 was being written
    assert any("Checkpoints: 1 saved between steps" in text for text in log.messages)
    monkeypatch.undo()
    fit(toy_config(tmp_path / "plain", save_every=4, save_in_background=in_background, **arguments))
    for step in ("step-00000004", "step-00000008"):
        slow, plain = (bytes_of(tmp_path / name / step) for name in ("slow", "plain"))
        assert slow == plain


def test_a_signal_waits_for_the_write_that_is_under_way(tmp_path, monkeypatch):
    true_save, saved = saving.save_checkpoint, []

    def save_checkpoint(run_dir, state):
        if state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
        saved.append(state.step)
        return true_save(run_dir, state)

    monkeypatch.setattr(saving, "save_checkpoint", save_checkpoint)
    result, _ = fit(toy_config(tmp_path, steps=1000, save_every=4, eval_every=2000, keep_best=0))
    assert result.stop_signal == signal.SIGTERM and saved[0] == 4
    assert [step_of(path.name) for path in list_checkpoints(tmp_path)] == sorted({4, result.steps}, reverse=True)
    assert result.checkpoint == list_checkpoints(tmp_path)[0]
