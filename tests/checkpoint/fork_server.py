"""Scenarios that kill, limit or fork the process that saves. Runs as `python -m tests.checkpoint.fork_server`.

torch is imported once; each trial is a fork of this process, which has no threads. Requests come as JSON lines on
stdin, [name, arguments], and are answered by one JSON line each on stdout.
"""

import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from tests.checkpoint.states import digest, make_state

from warploom.checkpoint import format as fmt
from warploom.checkpoint import save
from warploom.checkpoint.load import latest_checkpoint, load_checkpoint, verify_checkpoint
from warploom.checkpoint.lock import FolderLock
from warploom.checkpoint.retention import apply_retention
from warploom.errors import UserError

OLD, NEW = 1, 2

# A process killed at a call leaves the same on every file system; only kills at random times need a real disk, for
# there an fsync takes long enough to be hit.
_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None


# What the child does. Each prepares the run folder, then acts; check() knows what may be found afterwards.
def save_next_step(run_dir, states):
    save.save_checkpoint(run_dir, states[NEW])


def save_same_step(run_dir, states):
    """Replace the checkpoint of step OLD by one of the same step and other content."""
    replacement = states[NEW]
    replacement.step = OLD
    save.save_checkpoint(run_dir, replacement)


# Planted bugs: what the tests must find.
def save_in_place(run_dir, states):
    final = Path(run_dir, fmt.folder_name(NEW))
    final.mkdir()
    save._write_files(final, states[NEW])


def save_same_step_by_deleting(run_dir, states):
    shutil.rmtree(Path(run_dir, fmt.folder_name(OLD)))
    save_same_step(run_dir, states)


ACTIONS = {
    action.__name__: action for action in (save_next_step, save_same_step, save_in_place, save_same_step_by_deleting)
}


class Trial:
    """One run folder with the old checkpoint, one child that acts on it, and what it leaves."""

    def __init__(self, action, width, parent=_MEMORY):
        self.action = ACTIONS[action]
        self.run_dir = Path(tempfile.mkdtemp(prefix="kill-", dir=parent))
        self.states = {step: make_state(step, width=width) for step in (OLD, NEW)}
        save.save_checkpoint(self.run_dir, self.states[OLD])
        self.old = digest(self.states[OLD])
        if action.startswith("save_same_step"):
            self.states[NEW].step = OLD
        self.new = digest(self.states[NEW])

    def start(self, hook):
        """Fork a child that calls hook(report, name, function, arguments) in place of each system call that writes."""
        self.reports, write_end = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(write_end)
            return
        try:
            install(lambda *call: hook(lambda phase: os.write(write_end, phase), *call))
            os.write(write_end, b"s")
            self.action(self.run_dir, self.states)
            os.write(write_end, b"d")
        finally:
            os._exit(0)

    def finish(self):
        """Wait for the child. Return its reports: s(tart), the first letter of each call, d(one)."""
        _, self.status = os.waitpid(self.pid, 0)
        reports = b""
        while chunk := os.read(self.reports, 65536):
            reports += chunk
        os.close(self.reports)
        return reports.decode()

    def outcome(self):
        """Say what a fresh start finds: old, new, lost (nothing loads), torn (a mix), partial (an unfinished one)."""
        try:
            for path in fmt.list_checkpoints(self.run_dir):
                verify_checkpoint(path)
            newest = latest_checkpoint(self.run_dir)
            found = digest(load_checkpoint(newest)) if newest else None
            # The next save must work whatever was left, and leave nothing of it.
            save.save_checkpoint(self.run_dir, make_state(9, width=4))
            left = [name for name in os.listdir(self.run_dir) if fmt.step_of(name) is None or not name[0].isalpha()]
        except UserError:
            return "partial"
        finally:
            shutil.rmtree(self.run_dir)
        if left:
            return f"left {left}"
        return {None: "lost", self.old: "old", self.new: "new"}.get(found, "torn")


def install(hook):
    """Route every call that changes the disk through hook(name, function, arguments)."""

    def routed(name, function):
        return lambda *args, **kwargs: hook(name, lambda: function(*args, **kwargs), args)

    save._write = routed("write", os.write)
    save._fsync = routed("fsync", os.fsync)
    save._rename = routed("rename", os.rename)
    os.unlink = routed("unlink", os.unlink)  # by which shutil.rmtree removes
    os.rmdir = routed("RMDIR", os.rmdir)
    os.mkdir = routed("mkdir", os.mkdir)


def report_only(report, name, call, args):
    report(name[:1].encode())
    return call()


def kill_at_random_times(action, count, seed, width):
    """Kill saves at times drawn from the length of an undisturbed one. Return [outcome, reports, killed] of each.

    At least count are killed, and more, up to four times as many, until half of count met a save under way: on a busy
    machine a save may begin late or end early.
    """
    durations = []
    for _ in range(3):
        trial = Trial(action, width, tempfile.gettempdir())
        trial.start(report_only)
        start = time.perf_counter()
        reports = trial.finish()
        durations.append(time.perf_counter() - start)
        assert reports.endswith("d") and trial.outcome() == "new"
    results = []
    draw = random.Random(seed)
    while len(results) < count or (len(results) < 4 * count and sum(map(met_a_save, results)) < count // 2):
        trial = Trial(action, width, tempfile.gettempdir())
        trial.start(report_only)
        first = os.read(trial.reports, 1)
        deadline = time.perf_counter() + draw.uniform(0, 0.9 * min(durations))
        seen = first.decode()
        while (left := deadline - time.perf_counter()) > 0 and select.select([trial.reports], [], [], left)[0]:
            chunk = os.read(trial.reports, 65536)
            if not chunk:
                break
            seen += chunk.decode()
        os.kill(trial.pid, signal.SIGKILL)
        seen += trial.finish()
        killed = os.WIFSIGNALED(trial.status) and os.WTERMSIG(trial.status) == signal.SIGKILL
        results.append([trial.outcome(), seen, killed])
    return results


def met_a_save(result):
    _, reports, killed = result
    return killed and not reports.endswith("d")


def kill_at_every_call(action, width):
    """Kill before, inside (a half write) and after each call. Return {point: outcome} and the calls of a whole save."""
    trial = Trial(action, width)
    trial.start(report_only)
    calls = trial.finish()[1:-1]
    assert trial.outcome() == "new"
    outcomes = {}
    for index, letter in enumerate(calls):
        for moment in ("before", "inside", "after") if letter == "w" else ("before", "after"):
            trial = Trial(action, width)
            trial.start(killer(index, moment))
            reports = trial.finish()
            assert os.WIFSIGNALED(trial.status), f"the child outlived its kill {moment} call {index}"
            assert len(reports) == index + 2, f"killed {moment} call {len(reports) - 2}, not {index}"
            outcomes[f"{moment} {index}:{letter}"] = trial.outcome()
    return {"calls": calls, "outcomes": outcomes}


def killer(index, moment):
    counted = 0

    def hook(report, name, call, args):
        nonlocal counted
        report(name[:1].encode())
        counted += 1
        if counted <= index:
            return call()
        if moment == "inside":
            os.write(args[0], args[1][: len(args[1]) // 2])
        elif moment == "after":
            call()
        os.kill(os.getpid(), signal.SIGKILL)

    return hook


def kill_in_retention():
    """Kill apply_retention at each call. Return [steps left, whether all verify] for each point, and the number."""
    results = []
    index, finished = 0, False
    while not finished:
        run_dir = Path(tempfile.mkdtemp(prefix="retention-", dir=_MEMORY))
        for step in range(1, 5):
            save.save_checkpoint(run_dir, make_state(step, width=4, heldout_loss=float(step)))
        pid = os.fork()
        if pid == 0:
            hook = killer(index, "after")
            install(lambda *call, hook=hook: hook(lambda phase: None, *call))
            apply_retention(run_dir, keep_last=2, keep_best=0)
            os._exit(0)
        finished = not os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        left = fmt.list_checkpoints(run_dir)
        for path in left:
            verify_checkpoint(path)
        results.append([fmt.step_of(path.name) for path in left])
        shutil.rmtree(run_dir)
        index += 1
    return results


def save_under_file_size_limit(limit):
    """Save with RLIMIT_FSIZE. Return the message, the outcome, and what lay in the folder."""
    trial = Trial("save_next_step", width=64)
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            save.save_checkpoint(trial.run_dir, trial.states[NEW])
            message = "saved"
        except save.SaveFailed as error:
            message = str(error)
        os.write(write_end, message.encode())
        os._exit(0)
    os.close(write_end)
    message = os.read(read_end, 65536).decode()
    os.close(read_end)
    os.waitpid(pid, 0)
    names = os.listdir(trial.run_dir)
    return {"message": message, "names": names, "run_dir": str(trial.run_dir), "outcome": trial.outcome()}


def save_with_little_memory(megabytes, spare_megabytes):
    """Save a state of that size with an address space only a little larger than now. Return "saved" or the error."""
    run_dir = tempfile.mkdtemp(prefix="memory-")
    state = make_state(1, width=4)
    state.weights = {f"w{index}": torch.zeros(1 << 18) for index in range(megabytes)}
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (spare_megabytes << 20),) * 2)
        try:
            save.save_checkpoint(run_dir, state)
            message = "saved"
        except MemoryError:
            message = "MemoryError"
        try:
            bytearray(megabytes << 20)
            message += ", unlimited"
        except MemoryError:
            pass
        os.write(write_end, message.encode())
        os._exit(0)
    os.close(write_end)
    message = os.read(read_end, 65536).decode()
    os.close(read_end)
    os.waitpid(pid, 0)
    shutil.rmtree(run_dir)
    return message


def save_as_unprivileged_user():
    """Save into a read-only folder, as nobody if we are root. Return the messages of save and of the lock."""
    parent = Path(tempfile.mkdtemp(prefix="readonly-"))
    parent.chmod(0o755)
    run_dir = parent / "run"
    save.save_checkpoint(run_dir, make_state(OLD, width=4))
    run_dir.chmod(0o555)
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        if os.geteuid() == 0:
            os.setuid(65534)
        messages = []
        for attempt in (lambda: save.save_checkpoint(run_dir, make_state(NEW, width=4)), FolderLock(run_dir).__enter__):
            try:
                attempt()
                messages.append("done")
            except UserError as error:
                messages.append(str(error))
        os.write(write_end, json.dumps(messages).encode())
        os._exit(0)
    os.close(write_end)
    messages = json.loads(os.read(read_end, 65536))
    os.close(read_end)
    os.waitpid(pid, 0)
    run_dir.chmod(0o755)
    found = [path.name for path in fmt.list_checkpoints(run_dir)]
    shutil.rmtree(parent)
    return {"messages": messages, "run_dir": str(run_dir), "found": found}


def hold_lock(with_surviving_child):
    """Lock a run folder in a child, try it from here, SIGKILL the child, try again. Return the pid and both results."""
    run_dir = Path(tempfile.mkdtemp(prefix="lock-"))
    held, held_end = os.pipe()
    blocker, blocker_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(blocker_end)
        with FolderLock(run_dir):
            grandchild = 0
            if with_surviving_child:
                grandchild = os.fork()
                if grandchild == 0:
                    os.write(held_end, str(os.getpid()).encode())
                    os.read(blocker, 1)
                    os._exit(0)
            else:
                os.write(held_end, b"0")
            os.read(blocker, 1)
        os._exit(0)
    grandchild = int(os.read(held, 32))
    results = [attempt_lock(run_dir)]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if grandchild:
        os.kill(grandchild, 0)  # it lives, or this raises
    results.append(attempt_lock(run_dir))
    os.close(blocker_end)
    for fd in (held, held_end, blocker):
        os.close(fd)
    shutil.rmtree(run_dir)
    return {"pid": pid, "results": results}


def attempt_lock(run_dir):
    try:
        with FolderLock(run_dir):
            return "locked"
    except UserError as error:
        return str(error)


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        kill_at_random_times,
        kill_at_every_call,
        kill_in_retention,
        save_under_file_size_limit,
        save_with_little_memory,
        save_as_unprivileged_user,
        hold_lock,
    )
}


def main():
    torch.set_num_threads(1)
    save._fsync = lambda fd: None  # here, where nothing is killed; the children bring the real one back
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(SCENARIOS[name](**arguments)), flush=True)


if __name__ == "__main__":
    main()
