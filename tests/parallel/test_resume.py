"""Runs of several processes that stop and go on: the same bits on the same layout, and, if asked, on a changing one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from warploom.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[2]
ELASTIC = {"deterministic": "elastic", "dtype": "fp32"}
DATA = {"data": -1}


def phases(*sizes_and_ends, parallel=DATA):
    return [[size, end, parallel] for size, end in sizes_and_ends]


CHANGING = phases((1, 3), (2, 6), (4, 9), (1, 12))
STOPPED_SHARDS = phases((2, 5), (2, 12), parallel={"shard": 2})
SAME = {"shards": "shard", "parts of layers": "tensor", "stages": "pipeline", "parts of rows": "context"}
RUNS = {
    "elastic": [phases((1, 12)), ELASTIC],
    "elastic, 1 to 2 to 4 to 1": [CHANGING, ELASTIC],
    "elastic, always 4": [phases((4, 12)), ELASTIC],
    "elastic bf16": [phases((1, 12)), {**ELASTIC, "dtype": "bf16", "optimizer": "muon"}],
    "elastic bf16, 1 to 2 to 4 to 1": [CHANGING, {**ELASTIC, "dtype": "bf16", "optimizer": "muon"}],
    "elastic, unbalanced tree": [CHANGING, ELASTIC, "unbalanced"],
    "elastic, sums in a ring": [CHANGING, ELASTIC, "ring"],
    "elastic, dropout not seeded": [CHANGING, ELASTIC, "unseeded"],
    **{
        f"{layout}, {how}": [phases((2, 12), parallel=sizes), {"micro_batch_size": 2, "dtype": "bf16"}, planted]
        for layout, sizes in (("two replicas", DATA), ("two parts of layers", {"tensor": 2}))
        for how, planted in (("packed", None), ("packed at each use", "packs at each use"), ("packed once", "stale"))
    },
    **{
        f"two {what}{how}": [phases(*ends, parallel={dimension: 2}), {"micro_batch_size": 4}]
        for what, dimension in SAME.items()
        for how, ends in (("", [(2, 12)]), (", stopped", [(2, 5), (2, 12)]))
    },
    "two shards, one forgets": [STOPPED_SHARDS, {"micro_batch_size": 4}, "rank 1 forgets"],
    "two shards, one forgets, checked": [STOPPED_SHARDS, {"micro_batch_size": 4}, "rank 1 forgets, checked"],
}


# What `make test` runs; the rest takes longer.
QUICK = (
    "elastic",
    "elastic, 1 to 2 to 4 to 1",
    "two replicas, packed",
    "two replicas, packed at each use",
    "two shards",
    "two shards, stopped",
    "two shards, one forgets, checked",
)


def ends_of(names, folder):
    """How each of these runs ended."""
    jobs = {}
    for number, name in enumerate(names):
        steps, settings, *planted = RUNS[name]
        arguments = {"out_dir": str(folder / str(number)), "phases": steps, "settings": settings}
        jobs[name] = ["run", {**arguments, "planted": planted[0] if planted else None}]
    path = os.pathsep.join(str(ROOT / part) for part in ("engine", "kernels", "."))
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.resumed_runs", json.dumps(jobs)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    return ends_of(QUICK, tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def long_ends(ends, tmp_path_factory):
    return ends | ends_of([name for name in RUNS if name not in QUICK], tmp_path_factory.mktemp("long"))


def is_same(a, b):
    """Whether two runs ended with the same weights, optimizer state and losses, to the bit."""
    assert "checkpoint" in a and "checkpoint" in b, (a, b)
    states = [load_checkpoint(end["checkpoint"]) for end in (a, b)]
    assert states[0].weights.keys() == states[1].weights.keys() and states[0].step == states[1].step == 12
    progress = [{**state.meta["progress"], "rewinds": 0} for state in states]
    return progress[0] == progress[1] and all(
        torch.equal(one[name], other[name])
        for one, other in ((states[0].weights, states[1].weights), (states[0].optimizer, states[1].optimizer))
        for name in one
    )


def test_replicas_that_change_in_number_give_the_bits_of_one_process(ends):
    assert is_same(ends["elastic"], ends["elastic, 1 to 2 to 4 to 1"])


@pytest.mark.slow
def test_so_they_do_in_bf16_with_muon(long_ends):
    assert is_same(long_ends["elastic bf16"], long_ends["elastic bf16, 1 to 2 to 4 to 1"])
    assert not is_same(long_ends["elastic bf16"], long_ends["elastic"])


@pytest.mark.slow
def test_four_replicas_give_the_bits_of_one_process(long_ends):
    assert is_same(long_ends["elastic"], long_ends["elastic, always 4"])


@pytest.mark.slow
@pytest.mark.parametrize("bug", ["unbalanced tree", "sums in a ring", "dropout not seeded"])
def test_planted_bugs_change_the_bits(long_ends, bug):
    assert not is_same(long_ends["elastic"], long_ends[f"elastic, {bug}"])


def test_replicas_keep_their_weights_packed_with_the_same_bits(ends):
    assert is_same(ends["two replicas, packed"], ends["two replicas, packed at each use"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["two replicas", "two parts of layers"])
def test_what_they_keep_is_read_and_renewed(long_ends, layout):
    assert is_same(long_ends[f"{layout}, packed"], long_ends[f"{layout}, packed at each use"])
    assert not is_same(long_ends[f"{layout}, packed"], long_ends[f"{layout}, packed once"])


def test_the_same_layout_goes_on_bit_for_bit(ends):
    assert is_same(ends["two shards"], ends["two shards, stopped"])


@pytest.mark.slow
@pytest.mark.parametrize("what", SAME)
def test_so_does_every_other(long_ends, what):
    assert is_same(long_ends[f"two {what}"], long_ends[f"two {what}, stopped"])


@pytest.mark.slow
def test_a_process_that_forgets_its_random_state_changes_the_bits(long_ends):
    assert not is_same(long_ends["two shards"], long_ends["two shards, one forgets"])


def test_a_process_that_forgets_its_random_state_is_named(ends):
    end = ends["two shards, one forgets, checked"]
    assert end["codes"] == [1, 1]
    for error in end["errors"]:
        assert "process 1 did not get back the random states that it saved in" in error.splitlines()[-1]
