"""Saves in the background: what was the state when the save began, while the run changes it; errors come out."""

import threading

import pytest
import torch
from tests.checkpoint.states import digest, make_state

from warploom.checkpoint import save
from warploom.checkpoint.background import BackgroundSaver
from warploom.checkpoint.load import load_checkpoint
from warploom.checkpoint.save import SaveFailed, save_checkpoint


class Gate:
    """Hold back what a thread writes until the test opens the gate."""

    def __init__(self, run_dir):
        self.run_dir, self.opened, self.entered = run_dir, threading.Event(), threading.Event()

    def write(self, state):
        self.entered.set()
        assert self.opened.wait(30)
        return save_checkpoint(self.run_dir, state)


def spoil(state):
    for tensors in (state.weights, state.optimizer, state.rng):
        for tensor in tensors.values():
            tensor.zero_()


def test_the_run_goes_on_and_what_is_written_is_what_was(tmp_path):
    gate = Gate(tmp_path)
    saver = BackgroundSaver(gate.write)
    assert saver.wait() is None
    for step in (1, 2, 3):
        gate.opened.clear()
        gate.entered.clear()
        state = make_state(step)
        saver.start(state)
        assert gate.entered.wait(30) and not (tmp_path / f"step-0000000{step}").exists()
        spoil(state)  # as the next step does
        gate.opened.set()
        path = saver.wait()
        assert path == tmp_path / f"step-0000000{step}"
        assert digest(load_checkpoint(path)) == digest(make_state(step))
    saver.finish()


def test_without_the_copy_the_test_above_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(BackgroundSaver, "_copy", lambda self, state: state)
    with pytest.raises(AssertionError):
        test_the_run_goes_on_and_what_is_written_is_what_was(tmp_path)


def test_the_copys_memory_is_kept(tmp_path):
    saver = BackgroundSaver(lambda state: save_checkpoint(tmp_path, state))
    addresses = []
    for step in (1, 2):
        saver.start(make_state(step))
        saver.wait()
        addresses.append(saver._memory.data_ptr())
    assert addresses[0] == addresses[1]
    state = make_state(3, width=48)
    state.weights["not contiguous"] = torch.randn(40, 30).T
    saver.start(state)
    assert digest(load_checkpoint(saver.wait())) == digest(state)
    saver.finish()


def test_an_error_comes_with_the_next_wait_and_only_once(tmp_path, monkeypatch):
    def refuse(fd, data):
        raise OSError(28, "No space left on device")

    saver = BackgroundSaver(lambda state: save_checkpoint(tmp_path, state))
    with monkeypatch.context() as patch:
        patch.setattr(save, "_write", refuse)
        saver.start(make_state(1))
        with pytest.raises(SaveFailed, match="No space left"):
            saver.wait()
    assert saver.wait() is None
    saver.start(make_state(2))
    assert saver.wait() == tmp_path / "step-00000002"
    saver.finish()


def test_finish_waits(tmp_path):
    gate = Gate(tmp_path)
    saver = BackgroundSaver(gate.write)
    saver.start(make_state(1))
    threading.Timer(0.2, gate.opened.set).start()
    saver.finish()
    assert (tmp_path / "step-00000001").exists()
