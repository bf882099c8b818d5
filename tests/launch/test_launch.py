"""Runs of `warploom launch` with two gloo processes: killed, frozen, stopped, started again; and torchrun's own."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from bench.faulty_run import FaultyRun, environment

from warploom.checkpoint.format import list_checkpoints
from warploom.train.load_model import load_model

STEPS = 60


def arguments(tokens, out_dir, **settings):
    values = {"steps": STEPS, "save-every": 5, "eval-every": 30, "eval-tokens": 300, **settings}
    return [
        *("train", "--data", str(tokens), "--train.out-dir", str(out_dir)),
        *("--model.vocab-size", "300", "--model.d-model", "32", "--model.num-layers", "2", "--model.num-heads", "2"),
        *("--model.max-seq-len", "16", "--model.dropout", "0.1", "--train.seq-len", "16", "--train.device", "cpu"),
        *("--train.global-batch-size", "8", "--train.micro-batch-size", "4", "--train.threads", "1"),
        *(word for name, value in values.items() for word in (f"--train.{name}", str(value))),
    ]


def weights(out_dir):
    path = list_checkpoints(out_dir)[0]
    assert path.name == f"step-{STEPS:08}"
    return load_model(path).model.state_dict()


def wait_for_a_new_checkpoint(out_dir):
    before = list_checkpoints(out_dir)[:1]
    until = time.monotonic() + 60
    while list_checkpoints(out_dir)[:1] == before and time.monotonic() < until:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def struck(tmp_path_factory, tokens):
    """A run with a process killed and one frozen, each when steps are being made."""
    folder = tmp_path_factory.mktemp("struck")
    strikes = [(1, signal.SIGKILL), (0, signal.SIGSTOP)]
    with FaultyRun(folder, ["--nproc", "2"], arguments(tokens, folder / "run")) as run:
        for event in run.follow(500):
            if event["event"] == "stepping" and strikes:
                wait_for_a_new_checkpoint(folder / "run")
                run.strike(*strikes.pop(0))
        assert not strikes, run.log
    return run, folder / "run"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, tokens):
    """The same run without a fault: stopped by SIGTERM, and ended by torchrun."""
    folder = tmp_path_factory.mktemp("stopped")
    with FaultyRun(folder, ["--nproc", "2"], arguments(tokens, folder / "run")) as run:
        for event in run.follow(500):
            if event["event"] == "stepping":
                # To all of them, as schedulers do: a second one to the same process would end it at once.
                for rank in range(2):
                    run.strike(rank, signal.SIGTERM)
                run.process.send_signal(signal.SIGTERM)
    at = list_checkpoints(folder / "run")[0]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*torchrun, "warploom.cli.main", *arguments(tokens, folder / "run")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    return run, folder / "run", at, done


def test_a_dead_and_a_frozen_process_are_named_and_the_run_goes_on_to_its_end(struck):
    run, _ = struck
    assert run.process.returncode == 0, run.log
    dead, frozen = run.of("fault")
    assert (dead["kind"], dead["ranks"], dead["exit_code"]) == ("dead", [1], -signal.SIGKILL)
    assert (frozen["kind"], frozen["ranks"]) == ("frozen", [0])
    for fault in (dead, frozen):
        assert f"rank {fault['ranks'][0]} (process " in fault["sentence"]
        last = r"last collective \w+ .+ \(number \d+\)"
        assert re.search(rf" in step \d+, phase '[a-z :]+', {last}$", fault["sentence"]), fault["sentence"]
        assert f"warploom launch: {fault['sentence']}; restart " in run.log
    assert [event["attempt"] for event in run.of("start")] == [0, 1, 2]
    pids = [pid for event in run.of("start") for pid in event["pids"]]
    assert len(set(pids)) == 6
    # Each start went on from the last checkpoint before the fault.
    steps = [int(step) for step in re.findall(r"Going on from step (\d+)", run.log)]
    assert len(steps) == 2 and 0 < steps[0] < steps[1]


def test_sigterm_saves_and_ends_with_its_own_exit_code(stopped):
    run, _, at, _ = stopped
    assert run.process.returncode == 128 + signal.SIGTERM, run.log
    assert "the same command goes on from there" in run.log and str(at) in run.log
    assert run.of("fault") == [] and len(run.of("start")) == 1  # the control of the test above


def test_torchrun_ends_the_run_with_the_same_bits(struck, stopped):
    _, folder, at, done = stopped
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(at.name.removeprefix("step-")) < STEPS and f"from step {int(at.name[5:])}" in done.stdout
    expected = weights(folder)
    assert len(expected) > 10
    for name, tensor in weights(struck[1]).items():
        assert torch.equal(tensor, expected[name]), name


def test_what_a_person_must_mend_is_said_once_and_not_tried_again(tmp_path, tokens):
    words = [*arguments(tokens, tmp_path / "run"), "--parallel.tensor", "3"]
    with FaultyRun(tmp_path, ["--nproc", "2"], words) as run:
        list(run.follow(120))
    assert run.process.returncode == 2 and run.log.count("parallel tensor 3 = 3 does not divide the 2 processes") == 1
    assert len(run.of("start")) == 1


def test_a_deadlock_and_a_call_that_holds_the_interpreter_are_named_with_their_stacks(tmp_path):
    events = tmp_path / "events.jsonl"
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("hanging_run.py")), "launch", str(events)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    faults = [event for event in map(json.loads, events.read_text().splitlines()) if event["event"] == "fault"]
    assert [(fault["kind"], fault["ranks"]) for fault in faults] == [("stuck", [1]), ("frozen", [0])]
    stuck, frozen = (fault["sentence"] for fault in faults)
    waiting = r"rank 0 is in step 31, phase 'step', last collective all_reduce SUM float32 \(5,\) \(number 31\)"
    behind = r"rank 1 is in step 31, phase 'step', last collective all_reduce SUM float32 \(5,\) \(number 30\)"
    assert re.fullmatch(rf"no progress for \d+\.\d s: {behind}; {waiting}", stuck)
    assert re.match(r"rank 0 \(process \d+\) is frozen: no pulse for \d\.\d s, in step 31", frozen)
    for function in ("wait_for_a_lock_of_its_own", "hold_the_interpreter", "all_reduce"):
        assert f"in {function}" in done.stderr


def test_what_processes_are_forked_from_has_no_threads_and_asks_nothing_of_a_gpu():
    code = """
import os, torch
def refuse(*arguments):
    raise RuntimeError("a GPU was asked for, which forks then cannot use")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.get_device_capability = refuse
from warploom.cli import launch, standby
standby.prepare()
print(len(os.listdir("/proc/self/task")), torch.cuda.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["1", "False"], done.stderr[-3000:]


@pytest.mark.slow
def test_two_machines_start_again_together(tmp_path, tokens):
    """Two launchers, as on two machines, with a process each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = ["--nnodes", "2", "--rendezvous", f"localhost:{port}", "--run-id", "two"]
    words = arguments(tokens, tmp_path / "run")
    with FaultyRun(tmp_path / "0", flags, words) as first, FaultyRun(tmp_path / "1", flags, words) as second:
        for event in second.follow(300):
            if event["event"] == "stepping" and len(second.of("start")) == 1:
                wait_for_a_new_checkpoint(tmp_path / "run")
                second.strike(0, signal.SIGKILL)
        list(first.follow(120))
    assert (first.process.returncode, second.process.returncode) == (0, 0), first.log + second.log
    assert [len(run.of("start")) for run in (first, second)] == [2, 2]
    (killed,) = [fault for run in (first, second) for fault in run.of("fault") if fault["exit_code"] == -9]
    assert killed["ranks"] == [second.of("fault")[0]["ranks"][0]]
    assert weights(tmp_path / "run")


@pytest.mark.slow
def test_torchruns_own_restart_goes_on_too(tmp_path, tokens):
    """With --max-restarts torchrun lets all starts meet in one store; each has a name of its own in it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    log = tmp_path / "log.txt"
    with log.open("wb") as file:
        run = subprocess.Popen(
            [*torchrun, "--max-restarts", "1", "-m", "warploom.cli.main", *arguments(tokens, tmp_path / "run")],
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    wait_for_a_new_checkpoint(tmp_path / "run")
    workers = psutil.Process(run.pid).children()
    workers[-1].kill()
    assert run.wait(300) == 0, log.read_text()
    assert int(re.findall(r"Going on from step (\d+)", log.read_text())[0]) > 0
    assert weights(tmp_path / "run")


@pytest.mark.slow
def test_processes_whose_launcher_is_killed_save_and_go(tmp_path, tokens):
    words = arguments(
        tokens, tmp_path / "run", **{"steps": 1_000_000, "save-every": 1_000_000, "eval-every": 1_000_000}
    )
    with FaultyRun(tmp_path, ["--nproc", "2"], words) as run:
        next(event for event in run.follow(300) if event["event"] == "stepping")
        children = psutil.Process(run.process.pid).children(recursive=True)
        assert set(run.pids) < {child.pid for child in children}  # and what they are forked from
        run.process.kill()
        run.process.wait()
        until = time.monotonic() + 200
        while any(map(is_alive, children)) and time.monotonic() < until:
            time.sleep(0.05)
        assert not any(map(is_alive, children))
    assert list_checkpoints(tmp_path / "run")


def is_alive(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # nobody may be there to take note of its end
    except psutil.NoSuchProcess:
        return False
