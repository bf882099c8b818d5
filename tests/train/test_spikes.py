"""Spikes of a finite loss or gradient norm: found by a rule that spikes do not move, said, and skipped if asked for."""

import random
import statistics

import pytest
from tests.train.toy import Log, ToyData, counting, fit_poisoned, toy_config, toy_model

from warploom.errors import UserError
from warploom.train.spikes import robust_zscore
from warploom.train.trainer import Trainer

SPIKES = (10, 13)
WATCH = {"steps": 16, "spike_window": 6, "model": {"dropout": 0.0}}


def is_equal(a, b):
    return all(a[name].equal(b[name]) for name in a)


def test_the_zscore_is_that_of_the_normal_distribution_and_earlier_spikes_do_not_hide_a_new_one():
    draw = random.Random(0)
    quiet = [draw.gauss(10.0, 0.5) for _ in range(10_000)]
    assert robust_zscore(12.0, quiet) == pytest.approx(4.0, abs=0.2)
    assert robust_zscore(8.0, quiet) == pytest.approx(-4.0, abs=0.2)
    spiky = quiet[:120] + [100.0] * 8
    assert robust_zscore(100.0, spiky) > 100
    # With mean and standard deviation in their place the eight would hide the ninth: the test can tell them apart.
    assert (100.0 - statistics.mean(spiky)) / statistics.stdev(spiky) < 5


def test_what_hardly_moves_has_no_spikes():
    assert robust_zscore(2.01, [2.0] * 10) == pytest.approx(0.5)
    assert robust_zscore(0.0, [0.0] * 10) == 0.0


def test_a_spike_that_is_to_be_skipped_changes_no_bit_and_its_data_are_recorded(tmp_path):
    log = Log()
    config = toy_config(tmp_path, on_spike="skip", **WATCH)
    result, weights, trainer = fit_poisoned(config, SPIKES, log, factor=100.0)
    assert result.skipped_steps == 2 and result.steps == 16 and log.spikes == []
    assert [(s.step, s.num_sequences, s.position) for s in log.skips] == [
        (step, 8, {"position": 2 * (step - 1)}) for step in SPIKES
    ]
    assert all("was a spike: its loss" in skip.why for skip in log.skips)
    assert [step for step in range(1, 16) if is_equal(weights[step - 1], weights[step])] == list(SPIKES)
    # Not in the window either, so that many of them do not become what is usual.
    assert max(trainer.progress.recent["loss"]) < 5


def test_moments_and_counts_are_as_before_too(tmp_path):
    # One run whose 10th and 13th batch are skipped, and one that never gets to see them.
    class Without(ToyData):
        def train_batches(self, micro_batch_size):
            stream = super().train_batches(micro_batch_size)
            make_batch = stream.make_batch

            def other(size, generator):
                while (stream.position - 1) // 2 + 1 in SPIKES:
                    generator.manual_seed(1000 * stream.seed + stream.position)
                    stream.position += 1
                return make_batch(size, generator)

            stream.make_batch = other
            return stream

    schedule = {"warmup_steps": 0, "kind": "constant"}
    config = toy_config(tmp_path / "a", on_spike="skip", schedule=schedule, **WATCH)
    _, _, spiked = fit_poisoned(config, SPIKES, factor=100.0)
    config = toy_config(tmp_path / "b", schedule=schedule, **{**WATCH, "steps": 14})
    other = Trainer(toy_model(config), Without(counting), config)
    other.fit()
    assert is_equal(spiked.model.state_dict(), other.model.state_dict())
    for mine, theirs in zip(spiked.optimizers, other.optimizers, strict=True):
        mine, theirs = mine.state_dict()["state"], theirs.state_dict()["state"]
        assert all(mine[index][name].equal(value) for index, state in theirs.items() for name, value in state.items())


def test_by_default_a_spike_is_said_and_trained_on(tmp_path):
    log = Log()
    result, weights, _ = fit_poisoned(toy_config(tmp_path, **WATCH), SPIKES, log, factor=100.0)
    assert result.skipped_steps == 0 and [spike.step for spike in log.spikes] == list(SPIKES)
    assert not any(is_equal(weights[step - 1], weights[step]) for step in range(1, 16))


@pytest.mark.parametrize("settings", [{}, {"on_spike": "skip"}])
def test_a_run_without_spikes_has_none(tmp_path, settings):
    log = Log()
    result, _, _ = fit_poisoned(toy_config(tmp_path, **WATCH, **settings), [], log)
    assert log.spikes == log.skips == [] and result.skipped_steps == 0


def test_nothing_is_a_spike_where_none_is_looked_for(tmp_path):
    log = Log()
    config = toy_config(tmp_path, on_spike="skip", spike_zscore=0.0, **WATCH)
    result, _, _ = fit_poisoned(config, SPIKES, log, factor=100.0)
    assert log.spikes == log.skips == [] and result.skipped_steps == 0


def test_three_in_a_row_go_back_and_past_their_data(tmp_path):
    log = Log()
    config = toy_config(tmp_path, on_spike="skip", save_every=4, keep_best=0, **WATCH)
    result, weights, trainer = fit_poisoned(config, [10, 11, 12], log, factor=100.0)
    assert result.steps == 16 and trainer.progress.rewinds == 1
    assert is_equal(weights[12], weights[8]) and not is_equal(weights[9], weights[8])
    assert any("12, was a spike: its loss" in text and "step-00000008" in text for text in log.messages)


def test_spikes_without_end_end_the_run(tmp_path):
    config = toy_config(tmp_path, on_spike="skip", save_every=4, keep_best=0, **{**WATCH, "steps": 40})
    error, *_ = fit_poisoned(config, range(10, 40), factor=100.0)
    assert isinstance(error, UserError) and "after 3 returns to an earlier checkpoint" in str(error)


def test_a_run_that_goes_on_knows_what_was_usual(tmp_path):
    log = Log()
    config = toy_config(tmp_path, on_spike="skip", **{**WATCH, "steps": 8})
    fit_poisoned(config, [], log)
    config = toy_config(tmp_path, on_spike="skip", **WATCH)
    result, _, _ = fit_poisoned(config, SPIKES, log, factor=100.0)
    # The first of them comes before the window could fill again.
    assert [skip.step for skip in log.skips] == list(SPIKES) and result.skipped_steps == 2
