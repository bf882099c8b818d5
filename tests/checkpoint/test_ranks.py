"""Checkpoints of many processes: whole or nothing, the same for all, readable on any number; a mix is refused."""

import errno
import itertools
import os
import shutil
import threading

import pytest
import torch
from tests.checkpoint.states import digest, make_state
from tests.checkpoint.thread_ranks import share, take_rows, together, whole

from warploom.checkpoint import format as fmt
from warploom.checkpoint import load, ranks, save
from warploom.checkpoint.format import CheckpointDamaged, list_checkpoints
from warploom.checkpoint.load import load_checkpoint, load_part, load_weights_only, read_manifest, verify_checkpoint
from warploom.checkpoint.ranks import load_over_ranks, save_over_ranks
from warploom.checkpoint.retention import apply_retention
from warploom.checkpoint.save import SaveFailed, save_checkpoint
from warploom.errors import UserError


@pytest.fixture(autouse=True)
def no_power_loss(monkeypatch):
    monkeypatch.setattr(save, "_fsync", lambda fd: None)


def save_all(run_dir, state, size, change=lambda rank, state: state):
    """Save on size threads; return the folder or the error of each."""
    return together(size, lambda r: save_over_ranks(run_dir, change(r.rank, share(state, r.rank, size)), r))


def flip(path, offset=-1):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_what_many_write_one_reads_whole(tmp_path, size):
    state = make_state(7)
    state.run = "one run"
    paths = save_all(tmp_path, state, size)
    assert paths == [tmp_path / "step-00000007"] * size and os.listdir(tmp_path) == ["step-00000007"]
    loaded = load_checkpoint(paths[0])
    assert digest(loaded) == digest(whole(state, size)) and loaded.run == "one run"
    manifest = verify_checkpoint(paths[0])
    assert manifest.version == 2 and apply_retention(tmp_path) == []
    files = {fmt.file_of_rank(kind, rank) for kind in fmt.TENSOR_KINDS for rank in range(size)}
    assert {name for name in manifest.files if fmt.kind_of(name)} == files
    weights = load_weights_only(paths[0]).weights
    assert all(torch.equal(weights[name], tensor) for name, tensor in state.weights.items())


@pytest.mark.parametrize(("saved", "loaded"), list(itertools.product([None, 1, 2, 3], [1, 2, 3, 5])))
def test_any_number_reads_what_any_number_wrote(tmp_path, saved, loaded):
    state = make_state(7)
    if saved is None:
        save_checkpoint(tmp_path, state)  # the format of one process
    else:
        save_all(tmp_path, state, saved)
    results = together(loaded, lambda r: load_over_ranks(tmp_path, take_rows(r.rank, loaded), r, on_skip=pytest.fail))
    for rank, (path, part) in enumerate(results):
        assert path == tmp_path / "step-00000007"
        expected = share(state, rank, loaded)
        for found, tensors in ((part.weights, state.weights), (part.optimizer, state.optimizer)):
            assert found.keys() == tensors.keys()
            for name, tensor in found.items():
                place = expected.places.get(name)
                own = tensors[name] if place is None else tensors[name][place.start[0] :][: len(tensor)]
                assert torch.equal(tensor, own), name
        assert part.shapes == {name: tuple(tensor.shape) for name, tensor in state.weights.items()}


def test_a_process_reads_only_what_it_needs(tmp_path):
    save_all(tmp_path, make_state(7), 3)
    path = tmp_path / "step-00000007"

    def take(kind, name, shape):
        return ((0, 0), (16, 24)) if name == "embedding.weight" else None  # 48 rows on 3 processes: the first's

    for rank in (1, 2):
        (path / fmt.file_of_rank(fmt.WEIGHTS, rank)).write_bytes(b"")
    part = load_part(path, read_manifest(path), take)
    assert torch.equal(part.weights["embedding.weight"], make_state(7).weights["embedding.weight"][:16])
    assert list(part.weights) == ["embedding.weight"] and part.optimizer == part.rng == {}
    with pytest.raises(CheckpointDamaged, match="model.rank00001"):  # the control: one row more is another's
        load_part(path, read_manifest(path), lambda *_: ((0, 0), (17, 24)) if _[1] == "embedding.weight" else None)


class Faults:
    """Make a call by which files reach the disk fail on one thread."""

    def __init__(self, monkeypatch):
        self.fired, self.rank, self.at, self.code, self.calls = 0, None, None, None, itertools.count(1)
        self.names = {}
        for name in ("_write", "_fsync", "_rename"):
            monkeypatch.setattr(save, name, self._wrap(getattr(save, name)))

    def _wrap(self, function):

        def call(*arguments):
            if self.rank is not None and self.names.get(threading.get_ident()) == self.rank:
                if next(self.calls) == self.at:
                    self.fired += 1
                    raise OSError(self.code, os.strerror(self.code))
            return function(*arguments)

        return call

    def save(self, run_dir, state, size):

        def work(r):
            self.names[threading.get_ident()] = r.rank
            return save_over_ranks(run_dir, share(state, r.rank, size), r)

        self.calls = itertools.count(1)
        results = together(size, work)
        self.names.clear()
        return results


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_call_refused_on_one_process_fails_the_save_on_all(tmp_path, monkeypatch, rank):
    faults = Faults(monkeypatch)
    save_all(tmp_path, make_state(1), 3)
    faults.rank, faults.code = rank, errno.ENOSPC
    fired = set()
    for at in itertools.count(1):
        faults.fired, faults.at = 0, at
        results = faults.save(tmp_path, make_state(2), 3)
        if not faults.fired:
            break
        fired.add(at)
        # The last call of process 0 comes after the rename: there the new one is whole already.
        found = [digest(load_checkpoint(path)) for path in list_checkpoints(tmp_path)]
        assert found[-1] == digest(whole(make_state(1), 3)) and len(found) <= 2
        assert all(isinstance(result, SaveFailed) for result in results), at
        assert {str(result).split(": ")[0] for result in results} == {f"process {rank} of 3"}
        assert "No space left on device (ENOSPC)" in str(results[0])
        assert f"{list_checkpoints(tmp_path)[0].name} is kept" in str(results[0])
        assert all(not name.startswith(".tmp") for name in os.listdir(tmp_path))
        shutil.rmtree(tmp_path / "step-00000002", ignore_errors=True)
    assert len(fired) > 8
    assert results == [tmp_path / "step-00000002"] * 3  # the control: no call failed


def test_one_io_error_is_retried_by_all(tmp_path, monkeypatch):
    faults = Faults(monkeypatch)
    faults.rank, faults.code, faults.at = 1, errno.EIO, 4
    assert faults.save(tmp_path, make_state(2), 3) == [tmp_path / "step-00000002"] * 3
    assert faults.fired == 1 and digest(load_checkpoint(tmp_path / "step-00000002")) == digest(whole(make_state(2), 3))


def test_what_no_file_can_hold_fails_everywhere(tmp_path):
    def spoil(rank, state):
        if rank == 1:
            state.weights["mask"] = torch.zeros(2, dtype=torch.complex64)
        return state

    first, second = save_all(tmp_path, make_state(1), 2, spoil)
    assert isinstance(second, TypeError) and isinstance(first, SaveFailed)
    assert "process 1 of 2" in str(first) and "complex64" in str(first) and os.listdir(tmp_path) == []


@pytest.mark.parametrize("other", [{"step": 1}, {"run": "another"}])
def test_processes_that_are_not_in_step_commit_nothing(tmp_path, other):
    save_all(tmp_path, make_state(1), 2)

    def spoil(rank, state):
        if rank == 1:
            vars(state).update(other)
        return state

    results = save_all(tmp_path, make_state(2), 2, spoil)
    assert all(isinstance(result, SaveFailed) and "not in step" in str(result) for result in results)
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_a_file_of_another_step_or_run_is_known_as_such(tmp_path):
    for step, run in ((1, "first"), (2, "first"), (3, "second")):
        state = make_state(step)
        state.run = run
        save_all(tmp_path, state, 2)
    name = fmt.file_of_rank(fmt.OPTIMIZER, 1)
    good = tmp_path / "step-00000002"
    for other, words in ((1, "is of step 1 of run first"), (3, "is of step 3 of run second")):
        mixed = tmp_path / "mixed" / str(other) / good.name
        shutil.copytree(good, mixed)
        shutil.copyfile(tmp_path / fmt.folder_name(other) / name, mixed / name)
        for function in (verify_checkpoint, load_checkpoint, lambda path: load_checkpoint(path, verify=False)):
            with pytest.raises(CheckpointDamaged) as caught:
                function(mixed)
            assert name in str(caught.value) and f"{words}, its manifest of step 2 of run first" in str(caught.value)
    load_checkpoint(good)  # the control


def test_a_folder_that_is_not_shared_is_said(tmp_path, monkeypatch):
    written = ranks.write_tensor_files

    def elsewhere(folder, state, rank):
        files = written(folder, state, rank)
        if rank == 1:
            shutil.rmtree(folder / "x", ignore_errors=True)
            (folder / fmt.file_of_rank(fmt.RNG, 1)).unlink()
        return files

    monkeypatch.setattr(ranks, "write_tensor_files", elsewhere)
    results = save_all(tmp_path, make_state(1), 2)
    assert all("a file system that all processes share" in str(result) for result in results)
    assert list_checkpoints(tmp_path) == []


def test_all_take_the_same_checkpoint_when_one_finds_damage(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save_all(tmp_path, make_state(step), 3)
    flip(tmp_path / "step-00000003" / fmt.file_of_rank(fmt.OPTIMIZER, 2))
    messages = []
    results = together(3, lambda r: load_over_ranks(tmp_path, take_rows(r.rank, 3), r, on_skip=messages.append))
    assert [path.name for path, _ in results] == ["step-00000002"] * 3
    assert len(messages) == 3 and all("step-00000003" in text and "optimizer.rank00002" in text for text in messages)
    named = together(3, lambda r: load_over_ranks(tmp_path / "step-00000003", take_rows(r.rank, 3), r, on_skip=print))
    assert all(isinstance(error, UserError) and "is damaged" in str(error) for error in named)
    for step in (1, 2):
        flip(tmp_path / f"step-0000000{step}" / fmt.file_of_rank(fmt.OPTIMIZER, 0))
    results = together(3, lambda r: load_over_ranks(tmp_path, take_rows(r.rank, 3), r, on_skip=print))
    assert all("none of the 3 checkpoints" in str(error) for error in results)


def test_a_run_without_checkpoints(tmp_path):
    assert together(2, lambda r: load_over_ranks(tmp_path / "x", take_rows(r.rank, 2), r, on_skip=print)) == [None] * 2


@pytest.mark.parametrize("start", [0, 1, 8, 15, 16, 17, 31, 32])
def test_a_part_is_put_together_from_pieces_that_begin_elsewhere(tmp_path, start):
    save_all(tmp_path, make_state(7), 3)  # 16 rows of embedding.weight each
    path = tmp_path / "step-00000007"
    part = load_part(path, read_manifest(path), lambda kind, name, _: ((start, 3), (16, 9)) if "emb" in name else None)
    expected = make_state(7)
    assert torch.equal(part.weights["embedding.weight"], expected.weights["embedding.weight"][start:, 3:12][:16])
    assert len(part.optimizer) == 2
    for name, tensor in part.optimizer.items():
        assert torch.equal(tensor, expected.optimizer[name][start:, 3:12][:16])


def test_parts_that_leave_a_gap_are_refused(tmp_path):
    save_all(tmp_path, make_state(7), 2)
    path = tmp_path / "step-00000007"
    manifest = read_manifest(path)
    name = fmt.file_of_rank(fmt.WEIGHTS, 1)
    del manifest.files[name].tensors["embedding.weight"]
    with pytest.raises(CheckpointDamaged, match="lack 576 numbers"):
        load_part(path, manifest, lambda kind, n, shape: ((0, 0), shape) if n == "embedding.weight" else None)
    assert load.everything("", "", (2, 3)) == ((0, 0), (2, 3))
