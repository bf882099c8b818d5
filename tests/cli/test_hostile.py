"""The faults of docs/reliability.md as a person meets them: disks that refuse, other machines, signals, wrong flags.
What needs processes that die, kernels or a server is tested beside its source; the page says where."""

import errno
import json
import os
import re
import resource
import signal
import socket
from pathlib import Path

import pytest
import torch
from tests.cli.scene import NEWER, OLDER, refusal

from warploom.checkpoint import format as fmt
from warploom.checkpoint import save
from warploom.checkpoint.lock import FolderLock
from warploom.cli.main import main
from warploom.train import trainer

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(damage, scene, capsys):
    """Rows 8 to 10, where a run is named and not a checkpoint; the control is the run as it was."""
    assert main(["eval", str(scene.run)]) == 0
    output = capsys.readouterr()
    assert NEWER in output.out and output.err == ""
    weights = scene.newer / fmt.WEIGHTS
    {"flip": lambda: scene.flip(fmt.WEIGHTS), "truncate": lambda: os.truncate(weights, 5000), "remove": weights.unlink}[
        damage
    ]()
    before = scene.digests()
    assert main(["eval", str(scene.run)]) == 0
    output = capsys.readouterr()
    assert OLDER in output.out
    assert len(output.err.splitlines()) == 1
    assert "skipped a checkpoint" in output.err and NEWER in output.err and fmt.WEIGHTS in output.err
    assert scene.digests() == before


@pytest.fixture
def small_files():
    """No file may grow beyond the bytes that are set; the kernel refuses the write with EFBIG."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_a_disk_that_is_full(scene, capsys, small_files):
    """Row 5: the run goes on past the checkpoint that cannot be saved, and ends in words on the last."""
    before = scene.digests()
    small_files(40_000)
    said = refusal(scene.train(steps=8), capsys)
    small_files(resource.RLIM_INFINITY)
    assert f"step 8 could not be saved in {scene.run}: File too large (EFBIG)" in said
    assert re.search(r"it needs [\d,]+ bytes and [\d,]+ are free; step-00000004 is kept; make room", said)
    records = [json.loads(line) for line in (scene.run / "metrics.jsonl").read_text().splitlines()]
    assert max(record["step"] for record in records) == 8  # step 6, the first to be saved, did not end it
    assert scene.digests() == before
    assert main(scene.train(steps=8)) == 0  # the control, and the way out
    assert "Going on from step 4" in capsys.readouterr().out


def test_an_input_output_error(scene, capsys, monkeypatch):
    """Row 6: one is retried without a word; those that last are said."""
    calls = []

    def failing(times):
        def write(fd, data):
            calls.append(fd)
            if len(calls) <= times:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return os.write(fd, data)

        return write

    before = scene.digests()
    monkeypatch.setattr(save, "_write", failing(10**9))
    said = refusal(scene.train(), capsys)
    assert len(calls) == 2 and "Input/output error (EIO)" in said and "step-00000004 is kept" in said
    assert scene.digests() == before
    calls.clear()
    monkeypatch.setattr(save, "_write", failing(1))
    assert main(scene.train()) == 0 and len(calls) > 2
    assert (scene.run / "step-00000006").is_dir()


def test_what_a_dead_run_left_is_swept(scene):
    """Row 11. No process has the highest id that there is."""
    dead = Path("/proc/sys/kernel/pid_max").read_text().strip()
    left = [scene.run / f".tmp-step-00000006-{dead}", scene.run / f".trash-step-00000002-{dead}"]
    for folder in left:
        folder.mkdir()
        (folder / fmt.WEIGHTS).write_bytes(b"half of it")
    assert main(["eval", str(scene.run)]) == 0
    assert main(scene.train()) == 0
    assert not any(folder.exists() for folder in left)
    assert (scene.run / "step-00000006" / fmt.WEIGHTS).is_file()


def test_two_trainers_in_one_folder(scene, capsys):
    """Row 12."""
    before = scene.digests()
    with FolderLock(scene.run):
        assert f"in use by process {os.getpid()}; stop it or choose another folder" in refusal(scene.train(), capsys)
    assert scene.digests() == before
    assert main(scene.train()) == 0


def test_a_clock_that_was_set_back(scene, capsys):
    """Row 13: the newest is that of the highest step."""
    os.utime(scene.newer, (0, 0))
    assert main(["eval", str(scene.run)]) == 0
    assert "step 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--parallel.tensor", "3"], ["tensor 3 = 3 does not divide the 8 processes", "give parallel.tensor 8"]),
        (["--parallel.tensor", "8"], ["2 key/value heads", "give parallel.tensor 2 or less"]),
        (["--parallel.data", "4", "--parallel.shard", "4"], ["= 16 does not fill the 8", "start 16 processes"]),
        (["--train.global-batch-size", "4", "--train.micro-batch-size", "1"], ["data 8", "give 8 or more"]),
    ],
)
def test_other_numbers_of_processes(flags, words, scene, capsys, monkeypatch):
    """Row 16."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    before = scene.digests()
    said = refusal(scene.train(*flags), capsys)
    assert all(word in said for word in words), said
    assert scene.digests() == before


def test_another_number_of_threads_is_said(scene, capsys):
    """Row 17."""
    threads = torch.get_num_threads()
    try:
        assert main(scene.train("--train.threads", str(threads + 1))) == 0
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert f"perhaps not bit for bit, since the machine differs: threads {threads} then, {threads + 1} now" in said


def test_a_port_that_is_taken(scene, capsys):
    """Row 24."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        said = refusal(["serve", scene.run, "--port", port], capsys)
    assert str(port) in said


def test_a_signal_to_stop(scene, capsys, monkeypatch):
    """Row 27; a second one is sent in tests/train/test_resume.py."""
    step = trainer.training_step

    def signalled(*arguments, **named):
        outcome = step(*arguments, **named)
        os.kill(os.getpid(), signal.SIGTERM)
        return outcome

    monkeypatch.setattr(trainer, "training_step", signalled)
    assert main(scene.train(steps=50)) == 128 + signal.SIGTERM
    assert "the same command goes on from there" in capsys.readouterr().out
    monkeypatch.setattr(trainer, "training_step", step)
    assert main(scene.train(steps=6)) == 0
    assert "Going on from step 5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "--model.d-modl", "3"], ["--model.d-modl", "--model.d-model"]),
        (["train", "--model.d-model", "wide"], ["--model.d-model", "wide"]),
        (["train", "--train.dtype", "fp64"], ["fp64", "bf16"]),
    ],
)
def test_unknown_flags_and_wrong_types(argv, words, capsys):
    """Row 52: the parser's own words, over several lines."""
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words)
