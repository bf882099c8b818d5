"""The learning-rate factor: its shape, its ends, and the configuration's checks."""

import math

import pytest

from warploom.errors import UserError
from warploom.optim import ScheduleConfig, lr_multiplier


def curve(num_steps, **settings):
    return [lr_multiplier(ScheduleConfig(**settings), step, num_steps) for step in range(num_steps)]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_the_warm_up_is_a_straight_line_to_the_peak(kind):
    factors = curve(100, kind=kind, warmup_steps=10)
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert factors[10] == 1.0


def test_cosine_passes_the_middle_half_way_and_ends_at_the_floor():
    factors = curve(111, kind="cosine", warmup_steps=10, min_lr_ratio=0.2)
    assert factors[10] == 1.0 and factors[60] == pytest.approx(0.6) and factors[110] == pytest.approx(0.2)
    assert factors[35] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert all(a > b for a, b in zip(factors[10:], factors[11:], strict=False))


def test_wsd_is_flat_until_its_last_part_then_falls_in_a_line():
    factors = curve(100, kind="wsd", warmup_steps=10, decay_fraction=0.2, min_lr_ratio=0.0)
    assert set(factors[10:81]) == {1.0}
    assert factors[81] == pytest.approx(18 / 19) and factors[98] == pytest.approx(1 / 19) and factors[99] == 0.0


def test_constant_stays_at_the_peak():
    assert set(curve(50, kind="constant", warmup_steps=5)[5:]) == {1.0}


def test_the_default_warm_up_grows_with_the_run_up_to_a_hundred_steps():
    assert curve(50)[4] == 1.0 and curve(50)[3] == pytest.approx(0.8)
    assert curve(5000)[99] == 1.0 and curve(5000)[98] == pytest.approx(0.99)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 11])
@pytest.mark.parametrize("warmup", [None, 0, 1, 20])
def test_short_runs_and_steps_past_the_end_stay_between_floor_and_peak(kind, num_steps, warmup):
    config = ScheduleConfig(kind=kind, warmup_steps=warmup)
    assert all(0 < lr_multiplier(config, step, num_steps) <= 1 for step in range(num_steps + 30))
    if warmup != 20 and kind != "constant":
        assert lr_multiplier(config, num_steps + 25, num_steps) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "settings", [{"warmup_steps": -1}, {"decay_fraction": 0.0}, {"decay_fraction": 1.5}, {"min_lr_ratio": -0.1}]
)
def test_bad_settings_are_named(settings):
    with pytest.raises(UserError, match=f"schedule.{next(iter(settings))} is"):
        ScheduleConfig(**settings)
