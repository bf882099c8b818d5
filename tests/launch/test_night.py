"""The long forms: two hundred restarts, ten thousand steps in which nothing is wrong. `make test-night`."""

import pytest
from bench import goodput
from bench.faulty_run import FaultyRun
from tests.launch.test_launch import arguments

RESTARTS = 200
CLEAN_STEPS = 10_000


@pytest.mark.night
@pytest.mark.timeout(7200)
def test_two_hundred_of_two_hundred_restarts(tmp_path, tokens, capsys):
    # Raises unless every kill was found, the run ended as asked, and its metrics have each step once.
    outcome = goodput.run(tmp_path, tokens, goodput.save_flags(20, 0.0), restarts=RESTARTS, between_s=2.0)
    with capsys.disabled():
        print("\n" + goodput.line(f"{RESTARTS} restarts", outcome))
    assert (outcome.faults, outcome.recovered) == (RESTARTS, RESTARTS)


@pytest.mark.night
@pytest.mark.timeout(7200)
def test_no_false_alarm_in_ten_thousand_clean_steps(tmp_path, tokens):
    settings = {"steps": CLEAN_STEPS, "save-every": 200, "eval-every": 500}
    with FaultyRun(tmp_path, ["--nproc", "2"], arguments(tokens, tmp_path / "run", **settings)) as run:
        list(run.follow(7000))
    assert run.process.returncode == 0, run.log
    assert run.of("fault") == [] and len(run.of("start")) == 1
