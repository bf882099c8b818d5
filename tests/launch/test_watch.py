"""What exit codes and heartbeats are taken for. Time is given to the watch, so each case is exact."""

import time

import pytest

from warploom.errors import UserError
from warploom.launch.watch import Watch, WatchConfig
from warploom.parallel import heartbeat
from warploom.parallel.heartbeat import HeartbeatFile, Reading, beating, report, report_collective, report_signal

PIDS = [100, 101]


class Simulated:
    """Two processes that beat and report as told, polled every tenth of a second."""

    def __init__(self, **config):
        self.watch, self.now, self.exit_codes = Watch(WatchConfig(**config), 2), 0.0, {}
        self.readings = [Reading(1, 1, 4, 7, 0, "step", "all_reduce float32 (2,)")] * 2

    def change(self, place, **values):
        self.readings[place] = Reading(**{**vars(self.readings[place]), **values})

    def go(self, seconds, beats=(0, 1), works=(0, 1), every_s=0.1):
        """Poll for so long; return the moment of the first finding since now and the finding, or None."""
        start = self.now
        while self.now < start + seconds:
            self.now += every_s
            for place in beats:
                self.change(place, pulse=self.readings[place].pulse + 1)
            for place in works:
                self.change(place, reports=self.readings[place].reports + 1)
            found = self.watch.poll(self.now, self.readings, self.exit_codes, PIDS)
            if found is not None:
                return self.now - start, found
        return None


def test_who_beats_and_works_is_well():
    assert Simulated().go(1000) is None


def test_a_dead_process_is_found_at_the_next_poll_and_named():
    run = Simulated()
    run.go(3)
    run.exit_codes = {1: -9}
    after_s, found = run.go(1)
    assert after_s == pytest.approx(0.1) and (found.kind, found.ranks, found.exit_code) == ("dead", (1,), -9)
    assert found.sentence == (
        "rank 1 (process 101) was ended by SIGKILL in step 5, phase 'step', "
        "last collective all_reduce float32 (2,) (number 7)"
    )
    # The survivor ends too, for want of the other: the cause is named.
    run.exit_codes = {0: 1, 1: -9}
    assert run.go(1)[1].ranks == (1,)
    run.exit_codes = {0: 1}
    assert "rank 0 (process 100) ended with exit code 1 in step 5" in run.go(1)[1].sentence


def test_a_process_that_ended_well_is_no_finding_and_the_other_is_still_watched():
    run = Simulated()
    run.exit_codes = {0: 0}
    assert run.go(60, beats=(1,), works=(1,)) is None
    assert run.go(5, beats=())[1].ranks == (1,)


def test_a_frozen_process_is_found_after_its_limit():
    run = Simulated(frozen_s=3.0)
    run.go(3)
    assert run.go(2.8, beats=(0,), works=()) is None
    after_s, found = run.go(5, beats=(0,), works=())
    assert after_s < 0.5 and (found.kind, found.ranks) == ("frozen", (1,))
    assert found.sentence.startswith("rank 1 (process 101) is frozen: no pulse for 3.")


@pytest.mark.parametrize("phase", heartbeat.FIRST_PHASES)
def test_who_imports_or_compiles_may_be_silent_for_longer(phase):
    run = Simulated(frozen_s=3.0, frozen_first_s=30.0)
    run.change(1, phase=phase)
    run.go(1)
    assert run.go(29, beats=(0,)) is None
    assert run.go(2, beats=(0,))[1].ranks == (1,)


def test_a_run_that_makes_no_progress_is_stuck_and_who_is_behind_is_named():
    run = Simulated(stuck_s=4.0)
    run.go(3)
    run.change(0, collectives=8, phase="backward")
    assert run.go(3.8, works=()) is None
    found = run.go(5, works=())[1]
    assert (found.kind, found.ranks) == ("stuck", (1,))
    assert found.sentence.index("rank 1 is in step 5") < found.sentence.index("rank 0 is in step 5, phase 'backward'")


def test_long_pauses_raise_the_limit():
    run = Simulated(stuck_s=4.0, stuck_factor=20.0)
    run.go(1)
    run.go(0.9, works=())
    run.go(1)
    assert run.go(17, works=()) is None
    assert run.go(2, works=())[0] < 2
    # Control: without such a pause before it, the same silence is too long.
    assert Simulated(stuck_s=4.0, stuck_factor=20.0).go(17, works=()) is not None


@pytest.mark.parametrize("phase", (*heartbeat.PATIENT_PHASES, "first step: forward"))
def test_what_has_no_usual_length_has_a_limit_of_its_own_and_does_not_raise_the_other(phase):
    run = Simulated(patience_s=60.0)
    run.change(1, phase=phase)
    assert run.go(59, works=()) is None
    assert run.go(2, works=())[1].kind == "stuck"
    run = Simulated(patience_s=60.0)
    run.change(1, phase=phase)
    run.go(50, works=())
    run.change(1, phase="step")
    run.go(1)
    assert run.go(5, works=())[1].kind == "stuck"


def test_a_process_before_its_first_pulse_is_not_frozen():
    run = Simulated(patience_s=60.0)
    for place in (0, 1):
        run.change(place, pulse=0, reports=0, phase="start", step=None, collectives=0, collective="")
    assert run.go(59, beats=(), works=()) is None
    found = run.go(2, beats=(), works=())[1]
    assert "rank 0 is before its first step, phase 'start', last collective none" in found.sentence


def test_a_process_that_takes_itself_down_is_not_frozen():
    run = Simulated(patience_s=60.0)
    run.go(1)
    run.change(1, pulse=0, phase="end")
    assert run.go(59, beats=(0,), works=()) is None
    assert run.go(2, beats=(0,), works=())[1].kind == "stuck"


def test_a_machine_that_slept_raises_no_alarm():
    run = Simulated()
    run.go(3)
    run.now += 8 * 3600  # nobody ran, the watch included
    assert run.go(0.1, beats=(), works=()) is None
    assert run.go(60) is None
    assert run.go(4, beats=(0,))[1].kind == "frozen"  # it still finds what comes after


def test_limits_that_are_off_find_nothing():
    assert Simulated(frozen_s=0, frozen_first_s=0, stuck_s=0).go(10_000, beats=(), works=(), every_s=1.0) is None
    with pytest.raises(UserError, match="watch.frozen_s is -1"):
        WatchConfig(frozen_s=-1)


def test_what_a_process_reports_is_read():
    with HeartbeatFile.temporary(2) as file:
        file.clear()
        assert file.read(1) == Reading(0, 0, None, 0, 0, "start", "")
        with beating(file.path, 2, 1):
            report("set-up")
            report(part="model", step=3)
            report_signal()
            report_collective("all_reduce float32 (2,)")
            report_collective("broadcast " + "x" * 1000)
            while file.read(1).pulse < 3:
                time.sleep(0.01)
            reading = file.read(1)
        assert (reading.reports, reading.step, reading.collectives, reading.phase) == (4, 3, 2, "set-up: model")
        assert reading.signals == 1
        assert reading.collective.startswith("broadcast xxx") and len(reading.collective) == 184
        assert file.read(0) == Reading(0, 0, None, 0, 0, "start", "")  # the neighbour's
        report("nobody listens")
        assert (file.read(1).phase, file.read(1).pulse) == ("end", 0)
