"""A file system that refuses: each call fails once, by each error; the old checkpoint stays, the save says why."""

import errno
import itertools
import os
import re

import pytest
from tests.checkpoint.states import digest, make_state

from warploom.checkpoint import save
from warploom.checkpoint.format import list_checkpoints
from warploom.checkpoint.load import load_checkpoint
from warploom.checkpoint.save import SaveFailed, save_checkpoint


class Faults:
    """Count the system calls of a save and make some fail."""

    def __init__(self, monkeypatch):
        self.calls, self.fired, self.failing = 0, 0, {}
        monkeypatch.setattr(save, "_fsync", lambda fd: None)  # nothing here loses power
        for target, name in ((save, "_write"), (save, "_fsync"), (save, "_rename"), (os, "mkdir")):
            monkeypatch.setattr(target, name, self._wrap(getattr(target, name)))

    def _wrap(self, function):
        def call(*args, **kwargs):
            self.calls += 1
            code = self.failing.get(self.calls) or self.failing.get("all later" if self.fired else None)
            if code is not None:
                self.fired += 1
                raise OSError(code, os.strerror(code))
            return function(*args, **kwargs)

        return call

    def arm(self, failing):
        self.calls, self.fired, self.failing = 0, 0, failing


@pytest.fixture
def faults(monkeypatch):
    return Faults(monkeypatch)


@pytest.fixture(params=["next step", "same step"])
def scene(request, tmp_path, faults):
    """A run with the checkpoint of step 1, and a state to save next; the control: how many calls that takes."""
    run_dir = tmp_path / "run"
    old, new = make_state(1, width=4), make_state(2, width=4)
    if request.param == "same step":
        new.step = 1
    save_checkpoint(tmp_path / "control", old)
    faults.arm({})
    save_checkpoint(tmp_path / "control", new)
    num_calls = faults.calls
    save_checkpoint(run_dir, old)
    return run_dir, old, new, num_calls


def states_in(run_dir):
    """Digest every checkpoint; raises if one is not whole."""
    return [digest(load_checkpoint(path)) for path in list_checkpoints(run_dir)]


def test_every_call_refused(scene, faults):
    run_dir, old, new, num_calls = scene
    assert num_calls > 20
    codes = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES]
    for number, code in itertools.product(range(1, num_calls + 1), codes):
        faults.arm({number: code})
        with pytest.raises(SaveFailed) as caught:
            save_checkpoint(run_dir, new)
        assert faults.fired == 1
        message = str(caught.value)
        assert re.search(
            rf"could not be saved in {re.escape(str(run_dir))}: {os.strerror(code)} \({errno.errorcode[code]}\), it "
            rf"needs [\d,]+ bytes and [\d,]+ are free; step-0000000[12] is kept; make room or choose another folder",
            message,
        )
        left = states_in(run_dir)
        assert left in ([digest(old)], [digest(new)], [digest(new), digest(old)])
        faults.arm({})
        assert not any(name.startswith(".tmp") for name in os.listdir(run_dir))
        # The next attempt succeeds on whatever this one left, and the scene starts again.
        save_checkpoint(run_dir, new)
        assert states_in(run_dir)[0] == digest(new)
        for path in list_checkpoints(run_dir):
            save.discard(path)
        save_checkpoint(run_dir, old)
        assert os.listdir(run_dir) == ["step-00000001"]


def test_before_the_commit_the_old_checkpoint_is_untouched(scene, faults):
    run_dir, old, new, num_calls = scene
    for number in range(1, num_calls - 2 if new.step == 2 else num_calls - 6):
        faults.arm({number: errno.ENOSPC})
        with pytest.raises(SaveFailed):
            save_checkpoint(run_dir, new)
        assert states_in(run_dir) == [digest(old)]


def test_one_io_error_is_retried(scene, faults):
    run_dir, old, new, num_calls = scene
    for number in range(1, num_calls + 1):
        faults.arm({number: errno.EIO})
        save_checkpoint(run_dir, new)
        assert faults.fired == 1
        assert states_in(run_dir)[0] == digest(new)
        faults.arm({})
        for path in list_checkpoints(run_dir):
            save.discard(path)
        save_checkpoint(run_dir, old)


def test_lasting_io_errors_fail_the_save(scene, faults):
    run_dir, old, new, num_calls = scene
    for number in range(1, num_calls - 6, 5):
        faults.arm({number: errno.EIO, "all later": errno.EIO})
        with pytest.raises(SaveFailed, match=r"Input/output error \(EIO\)"):
            save_checkpoint(run_dir, new)
        assert faults.fired > 1
        assert states_in(run_dir) == [digest(old)]
        faults.arm({})


def test_short_writes_are_continued(tmp_path, monkeypatch):
    lengths = []

    def write_a_little(fd, data):
        lengths.append(min(len(data), 97))
        return os.write(fd, data[: lengths[-1]])

    monkeypatch.setattr(save, "_write", write_a_little)
    state = make_state(1)
    path = save_checkpoint(tmp_path, state)
    assert len(lengths) > 100
    assert digest(load_checkpoint(path)) == digest(state)


@pytest.mark.parametrize("limit", [1, 4096, 50_000])
def test_file_size_limit(in_forks, limit):
    result = in_forks("save_under_file_size_limit", limit=limit)
    assert re.search(
        rf"step 2 could not be saved in {result['run_dir']}: File too large \(EFBIG\), "
        r"it needs [\d,]+ bytes and [\d,]+ are free; step-00000001 is kept",
        result["message"],
    )
    assert result["names"] == ["step-00000001"]
    assert result["outcome"] == "old"


def test_no_file_size_limit(in_forks):
    result = in_forks("save_under_file_size_limit", limit=10**9)
    assert (result["message"], result["outcome"]) == ("saved", "new")


def test_saving_holds_no_second_copy(in_forks):
    assert in_forks("save_with_little_memory", megabytes=64, spare_megabytes=16) == "saved"


def test_read_only_folder(in_forks):
    result = in_forks("save_as_unprivileged_user")
    saved, locked = result["messages"]
    assert f"step 2 could not be saved in {result['run_dir']}: Permission denied (EACCES)" in saved
    assert f"the run folder {result['run_dir']} cannot be written: Permission denied" in locked
    assert result["found"] == ["step-00000001"]


def test_interruption_leaves_nothing(scene, monkeypatch):
    run_dir, old, new, _ = scene

    def interrupt(fd):
        raise KeyboardInterrupt

    monkeypatch.setattr(save, "_fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(run_dir, new)
    assert os.listdir(run_dir) == ["step-00000001"]
    assert states_in(run_dir) == [digest(old)]


def test_a_file_where_the_run_folder_should_be(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(SaveFailed, match="could not be saved in .*there is no earlier checkpoint"):
        save_checkpoint(tmp_path / "run" / "deeper", make_state(1, width=4))
