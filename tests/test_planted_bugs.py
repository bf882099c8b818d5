"""Bugs planted into a copy of the sources: each must turn a test red that is green without it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What is planted -> file, what stands there, what is put there instead, the test that must fail.
QUICK = {
    "silence is read off the clock": (
        *("engine/warploom/launch/watch.py", "min(now - self._polled_at, _LONGEST_POLL_S)", "now - self._polled_at"),
        "tests/launch/test_watch.py::test_a_machine_that_slept_raises_no_alarm",
    ),
}
LONG = {
    "a survivor is blamed for a death": (
        *("engine/warploom/launch/watch.py", "min(killed or bad)", "min(bad)"),
        "tests/launch/test_watch.py::test_a_dead_process_is_found_at_the_next_poll_and_named",
    ),
    "checked mode compares nothing": (
        *("engine/warploom/parallel/watched.py", "if call.what != theirs.what:", "if False:"),
        "tests/parallel/test_checked.py",
    ),
    "a gradient that is not counted here is not looked at": (
        *("engine/warploom/parallel/apply.py", " + rest,", ","),
        "tests/parallel/test_guard.py::test_all_processes_skip_the_step_and_no_bit_changes",
    ),
    "a spike is found and its update made all the same": (
        *("engine/warploom/train/step.py", "not is_finite or refuses(loss_value, norm_value)", "not is_finite"),
        "tests/train/test_spikes.py::test_a_spike_that_is_to_be_skipped_changes_no_bit_and_its_data_are_recorded",
    ),
    "gradients computed twice are compared with themselves": (
        *("engine/warploom/train/corruption.py", "first_grads, grads, strict", "grads, grads, strict"),
        "tests/train/test_corruption.py::test_every_flipped_bit_is_found_in_either_pass_and_named",
    ),
    "a rank that received a wrong number is named like the one that made it": (
        *("engine/warploom/parallel/checksums.py", "if place == min(places)", "if place is not None"),
        "tests/parallel/test_guard.py::test_a_bit_that_flips_in_one_process_ends_the_run_of_all_and_names_it",
    ),
    "processes meet in the store of those before them": (
        *("engine/warploom/parallel/mesh.py", "{restart}/{next(_joins)}", "{restart}"),
        "tests/parallel/test_checked.py",
    ),
    "what a person must mend is tried again": (
        *("engine/warploom/launch/agent.py", "FINAL = (2, ", "FINAL = ("),
        "tests/launch/test_launch.py::test_what_a_person_must_mend_is_said_once_and_not_tried_again",
    ),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the tracked files and what was built from them."""
    folder = tmp_path_factory.mktemp("copy")
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    built = ROOT.glob("engine/warploom/_C*.so"), ROOT.glob("engine/warploom/_build.json")
    for path in [*(ROOT / name for name in names if name), *(path for paths in built for path in paths)]:
        if path.is_file():
            to = folder / path.relative_to(ROOT)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to)
    return folder


def run_test(folder, test):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not night", "-p", "no:cacheprovider", test],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(folder / part) for part in ("engine", "kernels", "."))},
        capture_output=True,
        text=True,
        timeout=500,
    )


def check(copy, name, before, after, test):
    path = copy / name
    source = path.read_text(encoding="utf-8")
    assert source.count(before) == 1
    path.write_text(source.replace(before, after), encoding="utf-8")
    try:
        done = run_test(copy, test)
    finally:
        path.write_text(source, encoding="utf-8")
    assert done.returncode == 1 and ("1 failed" in done.stdout or "1 error" in done.stdout), done.stdout[-2000:]


@pytest.mark.parametrize("bug", QUICK)
def test_a_planted_bug_is_found(copy, bug):
    check(copy, *QUICK[bug])


@pytest.mark.slow
@pytest.mark.parametrize("bug", LONG)
def test_a_planted_bug_between_processes_is_found(copy, bug):
    check(copy, *LONG[bug])


def test_the_copy_without_a_bug_is_green(copy):
    done = run_test(copy, "tests/launch/test_watch.py")
    assert done.returncode == 0, done.stdout[-2000:]
