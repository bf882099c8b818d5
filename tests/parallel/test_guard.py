"""What one process has to tell all. A gradient that is not finite or a spike: all skip the step, no bit changes; after
three in a row all go back. Other bits than before: all end, and name it. A signal: all give the step up at the same
micro batch, and save."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = ("data", "shard", "tensor", "pipeline")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(str(Path(__file__).with_name("guarded_run.py")), str(folder)),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("engine", "kernels", "."))},
        capture_output=True,
        text=True,
        timeout=590,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def histories(results, layout, kind):
    """By rank: step -> skipped so far, digest before, digest after."""
    return [{step: rest for step, *rest in result[layout][kind]["history"]} for result in results]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_processes_skip_the_step_and_no_bit_changes(results, layout):
    for history in histories(results, layout, "poisoned"):
        assert history[5][1] == history[5][2] and history[5][0] == 1
        for step in (9, 10):
            assert history[step][1] == history[step][2]
        # The control: what is not poisoned is an update, on every process.
        for step in (1, 2, 3, 4, 6, 7, 8, 12, 13, 14):
            assert history[step][1] != history[step][2]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_after_three_in_a_row_all_go_back_to_the_checkpoint_and_past_the_data(results, layout):
    for result, history in zip(results, histories(results, layout, "poisoned"), strict=True):
        assert history[11][2] == history[8][2]
        assert history[12][1] == history[8][2]
        assert (result[layout]["poisoned"]["steps"], result[layout]["poisoned"]["rewinds"]) == (14, 1)
    assert any("3 steps in a row were skipped" in text for text in results[0][layout]["poisoned"]["messages"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_batches_of_skipped_steps_are_recorded(results, layout):
    records = results[0][layout]["poisoned"]["records"]
    # ToyStream's position is the number of whole batches that were read before.
    assert records == [[step, 8, {"position": step - 1}] for step in (5, 9, 10, 11)]


@pytest.mark.parametrize("layout", ["data", "pipeline"])
def test_all_processes_skip_a_spike_that_one_of_them_computes(results, layout):
    for history in histories(results, layout, "spiked"):
        unmoved = [step for step, (_, before, after) in history.items() if before == after]
        assert unmoved == [7, 9] and history[10][0] == 2
    spiked = results[0][layout]["spiked"]
    assert spiked["records"] == [[step, 8, {"position": step - 1}] for step in (7, 9)]
    assert all("was a spike: its gradient norm" in why for why in spiked["why"])


@pytest.mark.parametrize("layout", [*LAYOUTS, "elastic"])
def test_a_bit_that_flips_in_one_process_ends_the_run_of_all_and_names_it(results, layout):
    found = [result[layout]["flipped"] for result in results]
    assert [one["flipped"] for one in found] == [False, True]
    assert found[0]["error"] == found[1]["error"] and found[0]["kept"] == ["step-00000004"]
    # A pipeline's stages have different collectives: there what is wrong on the last reaches the first as well.
    ranks = "0 and 1" if layout == "pipeline" else "1"
    assert f"step 6 was computed twice from the same state, and rank {ranks} did not" in found[0]["error"]
    assert "the gradient of stack." in found[0]["error"]


def test_replicas_that_have_other_weights_are_found(results):
    found = [result["data"]["unlike"] for result in results]
    assert [one["flipped"] for one in found] == [False, True]
    for one in found:
        assert one["error"].startswith("before step 6 the replicas did not have the same weights any more: stack.norm")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_check_changes_no_bit(results, layout):
    pairs = zip(histories(results, layout, "control"), histories(results, layout, "poisoned"), strict=True)
    for checked, unchecked in pairs:
        assert [checked[step][2] for step in range(1, 5)] == [unchecked[step][2] for step in range(1, 5)]


@pytest.mark.parametrize("layout", [*LAYOUTS, "elastic"])
def test_a_run_that_is_finite_skips_nothing(results, layout):
    for result, history in zip(results, histories(results, layout, "control"), strict=True):
        control = result[layout]["control"]
        assert (control["steps"], control["skipped"], control["rewinds"], control["records"]) == (14, 0, 0, [])
        assert all(before != after for _, before, after in history.values())


@pytest.mark.parametrize("layout", ["data", "shard", "tensor"])
def test_a_signal_to_one_process_ends_a_long_step_of_all_and_the_run_goes_on_bit_for_bit(results, layout):
    expected = {"steps": 6, "signal": signal.SIGTERM, "resumed": 10, "equal": True}
    assert [result["signal"][f"{layout}, 0"] for result in results] == [expected] * 2


def test_a_step_that_ends_in_time_is_not_given_up(results):
    expected = {"steps": 7, "signal": signal.SIGTERM, "resumed": 10, "equal": True}
    assert [result["signal"]["shard, 60"] for result in results] == [expected] * 2


def test_after_a_short_step_all_know_of_the_signal_to_one(results):
    expected = {"steps": 7, "signal": signal.SIGTERM, "resumed": 10, "equal": True}
    assert [result["signal"]["data, short"] for result in results] == [expected] * 2
