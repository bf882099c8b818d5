"""Retention keeps what it promises, counts only sound checkpoints, and does not read what this process just wrote."""

import pytest
from tests.checkpoint.states import make_state

from warploom.checkpoint import format as fmt
from warploom.checkpoint import retention, save
from warploom.checkpoint.format import list_checkpoints, step_of
from warploom.checkpoint.load import verify_checkpoint
from warploom.checkpoint.retention import apply_retention
from warploom.checkpoint.save import save_checkpoint

LOSSES = {1: 5.0, 2: 3.0, 3: None, 4: 4.0, 5: float("nan"), 6: 4.5}


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(save, "_fsync", lambda fd: None)
    for step, loss in LOSSES.items():
        save_checkpoint(tmp_path, make_state(step, width=4, heldout_loss=loss))
    return tmp_path


def steps_in(run_dir):
    return [step_of(path.name) for path in list_checkpoints(run_dir)]


def damage(run_dir, step):
    with open(run_dir / fmt.folder_name(step) / fmt.WEIGHTS, "r+b") as file:
        file.seek(-1, 2)
        (byte,) = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "kept"),
    [
        (2, 1, [6, 5, 2]),
        (1, 0, [6]),
        (1, 1, [6, 2]),
        (2, 2, [6, 5, 4, 2]),
        (3, 3, [6, 5, 4, 2]),  # 4 is among the last and the best
        (2, 9, [6, 5, 4, 2, 1]),  # those without a loss are never the best
        (6, 1, [6, 5, 4, 3, 2, 1]),
        (9, 1, [6, 5, 4, 3, 2, 1]),
    ],
)
def test_keeps_the_last_and_the_best(run_dir, keep_last, keep_best, kept):
    removed = apply_retention(run_dir, keep_last, keep_best)
    assert steps_in(run_dir) == kept
    assert sorted(step_of(path.name) for path in removed) == sorted(set(LOSSES) - set(kept))
    assert not any(name.name.startswith(".") for name in run_dir.iterdir())


@pytest.mark.parametrize(
    ("damaged", "kept"),
    [
        ([6], [6, 5, 4, 2]),  # the damaged newest stays, and does not count
        ([6, 5, 4], [6, 5, 4, 3, 2]),
        ([5], [6, 5, 4, 2]),
        ([2], [6, 5, 4]),  # the best is damaged: the next best, 4, is kept instead
        ([6, 5, 4, 3, 2], [6, 5, 4, 3, 2, 1]),  # fewer sound ones than keep_last: nothing is deleted
        ([6, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1]),
    ],
)
def test_damaged_ones_do_not_count(run_dir, damaged, kept):
    for step in damaged:
        damage(run_dir, step)
    apply_retention(run_dir, keep_last=2, keep_best=1)
    assert steps_in(run_dir) == kept
    sound = [step for step in kept if step not in damaged]
    for step in sound:
        verify_checkpoint(run_dir / fmt.folder_name(step))
    assert len(sound) >= min(2, len(LOSSES) - len(damaged))


def test_counting_damaged_ones_loses_the_last_sound_one(run_dir, monkeypatch):
    """The planted bug of the test above."""
    damage(run_dir, 6)
    monkeypatch.setattr(retention, "_is_sound", lambda path: True)
    apply_retention(run_dir, keep_last=1, keep_best=0)
    assert steps_in(run_dir) == [6]


def test_those_of_a_newer_format_are_left_alone(run_dir):
    for step in (1, 6):
        folder = run_dir / fmt.folder_name(step)
        data = (folder / fmt.MANIFEST).read_bytes().replace(b'"version": 1', b'"version": 3')
        (folder / fmt.MANIFEST).write_bytes(data)
        (folder / fmt.MANIFEST_DIGEST).write_bytes(fmt.manifest_digest_line(data))
    apply_retention(run_dir, keep_last=1, keep_best=0)
    assert steps_in(run_dir) == [6, 5, 1]


def test_reads_again_only_what_may_have_changed(run_dir, monkeypatch):
    verified = []
    monkeypatch.setattr(retention, "verify_checkpoint", lambda path: verified.append(step_of(path.name)))
    apply_retention(run_dir)
    assert verified == []
    damage(run_dir, 6)
    apply_retention(run_dir)
    assert verified == [6]
    apply_retention(run_dir)
    assert verified == [6]
    monkeypatch.setattr(save, "_sound", {})  # as in a new process
    apply_retention(run_dir)
    assert verified == [6, 6, 5, 2]


def test_arguments(tmp_path):
    assert apply_retention(tmp_path) == []
    for arguments in ((0, 1), (-1, 1), (2, -1)):
        with pytest.raises(ValueError, match="keep_last must be at least 1"):
            apply_retention(tmp_path, *arguments)


def test_a_folder_that_cannot_be_deleted(run_dir, monkeypatch):
    def refuse(source, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(save, "_rename", refuse)
    with pytest.raises(save.SaveFailed, match="step-00000001 could not be deleted: Permission denied"):
        apply_retention(run_dir)
    assert steps_in(run_dir) == [6, 5, 4, 3, 2, 1]
