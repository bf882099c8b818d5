"""SIGKILL in a save, at random times and at every call: what a fresh start finds is the old or the new state, whole."""

import collections

import pytest


@pytest.mark.parametrize(
    ("action", "count"),
    [("save_next_step", 60), ("save_same_step", 30), pytest.param("save_next_step", 500, marks=pytest.mark.slow)],
)
def test_random_kills_lose_nothing(in_forks, action, count):
    results = in_forks("kill_at_random_times", action=action, count=count, seed=20, width=200)
    outcomes = collections.Counter(outcome for outcome, _, _ in results)
    assert set(outcomes) <= {"old", "new"}, outcomes
    # The fault fired: most kills met a save under way, each at another of its calls, most before it was committed.
    landed = [seen for _, seen, killed in results if killed and not seen.endswith("d")]
    assert len(landed) >= count // 2
    assert len({len(seen) for seen in landed}) >= 5
    assert outcomes["old"] >= count // 4


@pytest.mark.parametrize("action", ["save_next_step", "save_same_step"])
def test_kill_at_every_call(in_forks, action):
    result = in_forks("kill_at_every_call", action=action, width=8)
    outcomes = result["outcomes"]
    assert {"w", "f", "r", "m"} <= set(result["calls"])
    assert len(outcomes) > 2 * len(result["calls"])
    assert set(outcomes.values()) == {"old", "new"}, outcomes
    # Nothing is new before the rename that commits, and everything is after it.
    commit = [i for i, letter in enumerate(result["calls"]) if letter == "r"][0 if action == "save_next_step" else 1]
    for point, outcome in outcomes.items():
        moment, index = point.split(":")[0].split()
        done = int(index) > commit or (int(index) == commit and moment == "after")
        assert outcome == ("new" if done else "old"), point


@pytest.mark.parametrize(("action", "found"), [("save_in_place", "partial"), ("save_same_step_by_deleting", "lost")])
def test_planted_bugs_are_found(in_forks, action, found):
    outcomes = in_forks("kill_at_every_call", action=action, width=8)["outcomes"]
    assert found in outcomes.values()


def test_kill_in_retention(in_forks):
    left = in_forks("kill_in_retention")
    assert left[0] == [4, 3, 2]  # killed right after the oldest lost its name
    assert left[-1] == [4, 3]  # the control, not killed
    assert len(left) > 20
    assert all(steps in ([4, 3, 2], [4, 3]) for steps in left)
