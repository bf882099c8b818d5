"""Power loss, modelled: log a save's file operations, drop or cut what was not fsynced, and start from what is left.

The model keeps what POSIX promises and no more. fsync of a file keeps its bytes, fsync of a folder the entries made in
it so far. Of later writes any subset may be on the disk, each whole or cut short, with zeros where a lost one lay; of
later entries in a folder any prefix, since journals keep their order.
"""

import os
import random
import shutil
from pathlib import Path

import pytest
from tests.checkpoint.states import digest, make_state
from tests.checkpoint.thread_ranks import share, together, whole

from warploom.checkpoint import format as fmt
from warploom.checkpoint import save
from warploom.checkpoint.format import list_checkpoints
from warploom.checkpoint.load import load_checkpoint, verify_checkpoint
from warploom.checkpoint.ranks import save_over_ranks
from warploom.checkpoint.save import save_checkpoint
from warploom.errors import UserError

NUM_STATES = 600  # for each of the ways to save


class Recorder:
    """Log the operations of a save below root as (kind, path, ...), in order."""

    def __init__(self, monkeypatch, root):
        self.log, self.root = [], str(root)
        self.real = {"open": os.open, "mkdir": os.mkdir, "rmtree": shutil.rmtree}
        monkeypatch.setattr(os, "open", self._open)
        monkeypatch.setattr(os, "mkdir", self._mkdir)
        monkeypatch.setattr(shutil, "rmtree", self._rmtree)
        for name in ("_write", "_fsync", "_rename"):
            monkeypatch.setattr(save, name, getattr(self, name))

    def _relative(self, path):
        return os.path.relpath(path, self.root)

    def _open(self, path, flags, *args, **kwargs):
        if flags & os.O_CREAT:
            self.log.append(("create", self._relative(path)))
        return self.real["open"](path, flags, *args, **kwargs)

    def _mkdir(self, path, *args, **kwargs):
        self.real["mkdir"](path, *args, **kwargs)
        self.log.append(("mkdir", self._relative(path)))

    def _rmtree(self, path, *args, **kwargs):
        if os.path.isdir(path):
            self.log += [("unlink", self._relative(os.path.join(path, name))) for name in sorted(os.listdir(path))]
            self.log.append(("rmdir", self._relative(path)))
        self.real["rmtree"](path, *args, **kwargs)

    def _path_of(self, fd):
        return self._relative(os.readlink(f"/proc/self/fd/{fd}"))

    def _write(self, fd, data):
        offset = os.lseek(fd, 0, os.SEEK_CUR)
        written = os.write(fd, data)
        self.log.append(("write", self._path_of(fd), offset, bytes(data[:written])))
        return written

    def _fsync(self, fd):
        self.log.append(("fsync", self._path_of(fd)))

    def _rename(self, source, target):
        os.rename(source, target)
        self.log.append(("rename", self._relative(source), self._relative(target)))


class File:
    def __init__(self, data=b""):
        self.durable, self.pending = data, []  # pending: (offset, bytes) since the last fsync

    def sync(self):
        self.durable, self.pending = written(self.durable, self.pending), []


class Folder:
    def __init__(self):
        self.entries, self.durable, self.pending = {}, {}, []  # pending: (name, what it is from then on, or None)

    def set(self, name, node):
        self.pending.append((name, node))
        apply(self.entries, [(name, node)])

    def sync(self):
        self.durable, self.pending = dict(self.entries), []


def apply(entries, changes):
    for name, node in changes:
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


def written(data, writes):
    data = bytearray(data)
    for offset, piece in writes:
        data.extend(bytes(max(0, offset - len(data))))
        data[offset : offset + len(piece)] = piece
    return bytes(data)


def read_tree(path):
    """The model of a folder that lies safely on the disk."""
    folder = Folder()
    for entry in os.scandir(path):
        folder.entries[entry.name] = read_tree(entry.path) if entry.is_dir() else File(Path(entry.path).read_bytes())
    folder.sync()
    return folder


def replay(root, log):
    def find(path):
        node = root
        for part in Path(path).parts:
            node = node.entries[part]
        return node

    def parent(path):
        return find(os.path.dirname(path)), os.path.basename(path)

    for kind, path, *rest in log:
        if kind == "write":
            find(path).pending.append(tuple(rest))
        elif kind == "fsync":
            find(path).sync()
        else:
            folder, name = parent(path)
            if kind == "rename":
                # Renames here stay within the run folder; both halves become durable together.
                node = folder.entries[name]
                target = os.path.basename(rest[0])
                folder.pending.append(((name, target), node))
                apply(folder.entries, [(name, None), (target, node)])
            else:
                folder.set(name, {"create": File, "mkdir": Folder}.get(kind, lambda: None)())


def write_survivors(node, path, draw):
    """Write to path what a crash leaves of a node."""
    if isinstance(node, File):
        survivors = []
        for offset, piece in node.pending:
            fate = draw.random()
            if fate < 0.6:
                survivors.append((offset, piece if fate < 0.4 else piece[: draw.randrange(len(piece) + 1)]))
        path.write_bytes(written(node.durable, survivors))
        return
    path.mkdir()
    entries = dict(node.durable)
    for name, child in node.pending[: draw.randint(0, len(node.pending))]:
        apply(entries, [(name[0], None), (name[1], child)] if isinstance(name, tuple) else [(name, child)])
    for name, child in entries.items():
        write_survivors(child, path / name, draw)


@pytest.fixture
def crash_outcomes(tmp_path, monkeypatch):
    """Return a function: save (same step or next) on so many processes, 0 for save_checkpoint, crash in num_states
    ways, count what is found afterwards."""

    def run(same_step, num_states, plant=lambda patch: None, size=0):
        run_dir = tmp_path / "run"
        old, new = make_state(1, width=6), make_state(2, width=6)
        save_on(size, run_dir, old)
        if same_step:
            new.step = 1
        known = {digest(whole(state, size) if size else state): name for state, name in ((old, "old"), (new, "new"))}
        root = tmp_path / "before"
        shutil.copytree(run_dir, root)
        with monkeypatch.context() as patch:
            recorder = Recorder(patch, run_dir)
            plant(patch)
            save_on(size, run_dir, new)
        kinds = {kind for kind, *_ in recorder.log}
        assert {"create", "write", "rename", "mkdir"} <= kinds
        draw = random.Random(1)
        outcomes = []
        for number in range(num_states):
            # Each fifth crash comes after the save returned, when the new state was promised.
            length = len(recorder.log) if number % 5 == 0 else draw.randint(0, len(recorder.log))
            tree = read_tree(root)
            replay(tree, recorder.log[:length])
            crashed = tmp_path / "crashed"
            write_survivors(tree, crashed, draw)
            outcomes.append(("after" if number % 5 == 0 else "in", found_in(crashed, known)))
            shutil.rmtree(crashed)
        return outcomes

    return run


def save_on(size, run_dir, state):
    if not size:
        save_checkpoint(run_dir, state)
        return
    for result in together(size, lambda r: save_over_ranks(run_dir, share(state, r.rank, size), r)):
        assert isinstance(result, Path), result


def found_in(run_dir, known):
    """As a fresh start does: the newest checkpoint, and no listed one may be unfinished."""
    paths = list_checkpoints(run_dir)
    try:
        for path in paths:
            verify_checkpoint(path)
        return known.get(digest(load_checkpoint(paths[0])), "torn") if paths else "lost"
    except UserError:
        return "partial"


@pytest.mark.parametrize("size", [0, 2])
@pytest.mark.parametrize("same_step", [False, True])
def test_power_loss_leaves_old_or_new(crash_outcomes, same_step, size):
    outcomes = crash_outcomes(same_step, NUM_STATES, size=size)
    assert len(outcomes) == NUM_STATES
    assert {outcome for moment, outcome in outcomes if moment == "after"} == {"new"}
    assert {outcome for moment, outcome in outcomes if moment == "in"} == {"old", "new"}


def rename_then_write(run_dir, state):
    final = run_dir / fmt.folder_name(state.step)
    temporary = run_dir / ".tmp-step-00000002-1"
    temporary.mkdir()
    save._rename(temporary, final)
    save._write_files(final, state)
    save.fsync_folder(final)
    save.fsync_folder(run_dir)
    return final


def drop_fsync_of(is_dropped):
    def plant(patch):
        recording = save._fsync
        patch.setattr(
            save, "_fsync", lambda fd: None if is_dropped(os.readlink(f"/proc/self/fd/{fd}")) else recording(fd)
        )

    return plant


PLANTED_BUGS = {
    "files are not fsynced": drop_fsync_of(os.path.isfile),
    "no folder is fsynced": drop_fsync_of(os.path.isdir),
    "the checkpoint's folder is not fsynced": drop_fsync_of(lambda path: ".tmp-" in path and os.path.isdir(path)),
    "the run folder is not fsynced": drop_fsync_of(lambda path: path.endswith("/run")),
    "renamed before it is written": lambda patch: patch.setattr(save, "_save", rename_then_write),
}


@pytest.mark.parametrize("bug", PLANTED_BUGS)
def test_planted_bugs_are_found(crash_outcomes, bug):
    outcomes = crash_outcomes(False, 150, PLANTED_BUGS[bug])
    assert set(outcomes) - {("in", "old"), ("in", "new"), ("after", "new")}


PLANTED_OVER_RANKS = {
    "process 1 does not fsync its files": drop_fsync_of(lambda path: ".rank00001." in path),
    "process 0 does not fsync its files": drop_fsync_of(lambda path: ".rank00000." in path),
    "nobody fsyncs the checkpoint's folder": drop_fsync_of(lambda path: ".tmp-" in path and os.path.isdir(path)),
    "the run folder is not fsynced": drop_fsync_of(lambda path: path.endswith("/run")),
}


@pytest.mark.parametrize("bug", PLANTED_OVER_RANKS)
def test_planted_bugs_over_ranks_are_found(crash_outcomes, bug):
    outcomes = crash_outcomes(False, 150, PLANTED_OVER_RANKS[bug], size=2)
    assert set(outcomes) - {("in", "old"), ("in", "new"), ("after", "new")}
