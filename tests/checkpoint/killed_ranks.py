"""Saves of several gloo processes of which some are killed, for test_kill_ranks.py."""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.checkpoint.fork_server import NEW, OLD, install, killer
from tests.checkpoint.states import digest, make_state
from tests.checkpoint.thread_ranks import share, together, whole
from tests.parallel.forked import Forks, main

from warploom.checkpoint import format as fmt
from warploom.checkpoint import save
from warploom.checkpoint.load import latest_checkpoint, load_checkpoint, verify_checkpoint
from warploom.checkpoint.ranks import save_over_ranks
from warploom.errors import UserError
from warploom.parallel.state import all_json


class GlooRanks:
    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def exchange(self, value):
        return all_json(value)

    def own_meta(self, meta):
        return {"own": meta["own"]}

    def whole_meta(self, meta, own):
        return {**meta, "own": [one["own"] for one in own]}


# What the tests must find: protocols that look right.
def save_in_place(run_dir, state, ranks):
    """The folder has its final name from the beginning."""
    folder = Path(run_dir, fmt.folder_name(state.step))
    if ranks.rank == 0:
        folder.mkdir(exist_ok=True)
    ranks.exchange(None)
    _write_into(folder, state, ranks)


def overwrite(run_dir, state, ranks):
    """Each process replaces its files in the old checkpoint."""
    folder = Path(run_dir, fmt.folder_name(OLD))
    for path in folder.iterdir():
        if f"rank{ranks.rank:05d}" in path.name or (ranks.rank == 0 and "rank" not in path.name):
            path.unlink()
    _write_into(folder, state, ranks)


def commit_on_promises(run_dir, state, ranks):
    """Process 0 does not wait for the others' files, only for their checksums."""
    promised = Path(tempfile.mkdtemp(prefix="promised-"))
    files = save.write_tensor_files(promised, state, ranks.rank)
    shutil.rmtree(promised)
    folder, final = Path(run_dir, ".tmp-step-00000002-1"), Path(run_dir, fmt.folder_name(state.step))
    if ranks.rank == 0:
        folder.mkdir()
    ranks.exchange(None)
    reports = ranks.exchange({"files": fmt.encode_files(files), "meta": ranks.own_meta(state.meta)})
    if ranks.rank == 0:
        save.write_tensor_files(folder, state, 0)
        _finish(folder, state, ranks, reports)
        save.commit(folder, final)
        return
    try:
        save.write_tensor_files(folder, state, ranks.rank)
    except FileNotFoundError:  # committed between two of its files
        for path in final.glob(f"*rank{ranks.rank:05d}*"):
            path.unlink()
        save.write_tensor_files(final, state, ranks.rank)


def _write_into(folder, state, ranks):
    files = save.write_tensor_files(folder, state, ranks.rank)
    reports = ranks.exchange({"files": fmt.encode_files(files), "meta": ranks.own_meta(state.meta)})
    if ranks.rank == 0:
        _finish(folder, state, ranks, reports)


def _finish(folder, state, ranks, reports):
    files = {}
    for report in reports:
        files |= fmt.decode_files(report["files"])
    state.meta = ranks.whole_meta(state.meta, [report["meta"] for report in reports])
    save.write_manifest(folder, state, files | save.write_common_files(folder, state))


ACTIONS = {action.__name__: action for action in (save_over_ranks, save_in_place, overwrite, commit_on_promises)}


class Trial:
    """A run folder with an old checkpoint, processes that save a new one, and what they leave."""

    def __init__(self, action, size, width):
        self.action, self.size = ACTIONS[action], size
        self.run_dir = Path(tempfile.mkdtemp(prefix="killed-ranks-"))
        self.states = {step: make_state(step, width=width) for step in (OLD, NEW)}
        quiet = save._fsync
        save._fsync = lambda fd: None
        results = together(size, lambda r: save_over_ranks(self.run_dir, share(self.states[OLD], r.rank, size), r))
        save._fsync = quiet
        assert all(isinstance(result, Path) for result in results), results
        if action == "overwrite":
            self.states[NEW].step = OLD
        self.known = {digest(whole(self.states[step], size)): name for step, name in ((OLD, "old"), (NEW, "new"))}

    def start(self, hook=None):
        """Begin to save. hook(rank) prepares a process."""

        def work(rank):
            if hook is not None:
                hook(rank)
            Path(self.run_dir, f".started-{rank}").touch()
            self.action(self.run_dir, share(self.states[NEW], rank, self.size), GlooRanks(rank, self.size))

        self.forks = Forks(self.size, work)

    def outcome(self):
        """Say what a fresh start finds: old, new, lost (nothing loads), torn (a mix), partial (an unfinished one)."""
        for path in self.run_dir.glob(".started-*"):
            path.unlink()
        try:
            for path in fmt.list_checkpoints(self.run_dir):
                verify_checkpoint(path)
            newest = latest_checkpoint(self.run_dir)
            found = digest(load_checkpoint(newest)) if newest else None
            # The next save must work whatever was left, and leave nothing of it.
            save.save_checkpoint(self.run_dir, make_state(9, width=4))
            left = [name for name in os.listdir(self.run_dir) if fmt.step_of(name) is None]
        except UserError:
            return "partial"
        finally:
            shutil.rmtree(self.run_dir)
        if left:
            return f"left {left}"
        return self.known.get(found, "lost" if found is None else "torn")


def calls_of(action, size, width):
    """Return how many calls by which files reach the disk each process makes in an undisturbed save."""
    trial = Trial(action, size, width)
    counts = [trial.run_dir / f".started-calls-{rank}" for rank in range(size)]

    def count(rank):
        file = os.open(counts[rank], os.O_WRONLY | os.O_CREAT, 0o666)
        real_write = os.write
        install(lambda name, call, args: (real_write(file, b"x"), call())[1])

    trial.start(count)
    codes = trial.forks.wait()
    numbers = [path.stat().st_size for path in counts]
    outcome = trial.outcome()
    assert codes == [0] * size, [trial.forks.error(rank) for rank in range(size)]
    return numbers, outcome


def kill_at_calls(action, size, per_rank, width=8):
    """Kill each process at per_rank of its calls, spread over them, before and after in turn; 0 is at every call.
    Return the control's outcome, and of each trial: point, outcome, whether only the victim was killed."""
    numbers, control = calls_of(action, size, width)
    trials = []
    for victim in range(size):
        count = per_rank or numbers[victim]
        for index in sorted({numbers[victim] * i // count for i in range(count)} | {numbers[victim] - 1}):
            for moment in ("before", "after") if not per_rank else ("before", "after")[index % 2 :][:1]:
                trial = Trial(action, size, width)

                def hook(rank, victim=victim, index=index, moment=moment):
                    if rank == victim:
                        die = killer(index, moment)
                        install(lambda *call: die(lambda letter: None, *call))

                trial.start(hook)
                codes = trial.forks.wait(60)
                killed = codes[victim] == -signal.SIGKILL and codes.count(-signal.SIGKILL) == 1
                trials.append([f"rank {victim} {moment} {index}", trial.outcome(), killed])
    return {"calls": numbers, "control": control, "trials": trials}


def kill_at_random_times(size, count, seed, width=160):
    """Kill one process, or all, at times drawn over the length of a save, until count have met one under way or four
    times as many have been killed. Return [outcome, how many were killed] of each, and the control's outcome."""
    durations, draw, results = [], random.Random(seed), []
    for _ in range(2):
        control = Trial("save_over_ranks", size, width)
        control.start()
        _await_start(control)
        began = time.perf_counter()
        assert control.forks.wait() == [0] * size
        durations.append(time.perf_counter() - began)
        control_outcome = control.outcome()
    landed = 0
    while landed < count and len(results) < 4 * count:
        trial = Trial("save_over_ranks", size, width)
        trial.start()
        _await_start(trial)
        time.sleep(draw.uniform(0, 0.9 * min(durations)))
        victims = trial.forks.pids if draw.random() < 0.4 else [draw.choice(trial.forks.pids)]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        codes = trial.forks.wait(60)
        killed = sum(code == -signal.SIGKILL for code in codes)
        landed += killed == len(victims)
        results.append([trial.outcome(), killed])
    return {"control": control_outcome, "trials": results}


def _await_start(trial):
    while len(list(trial.run_dir.glob(".started-*"))) < trial.size:
        time.sleep(0.001)


SCENARIOS = {function.__name__: function for function in (kill_at_calls, kill_at_random_times)}

if __name__ == "__main__":
    main(SCENARIOS, sys.argv[1:])
