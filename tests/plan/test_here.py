"""Forecasts of this machine, and of published runs."""

import pytest
import torch
from tests.train.toy import ToyData, counting, toy_config, toy_model

from warploom.errors import UserError
from warploom.models.presets import preset
from warploom.plan.here import depths, extrapolate, measure
from warploom.plan.layout import Layout, Workload, checkpoint_copy_bytes
from warploom.plan.published import RUNS, reckon
from warploom.plan.run_error import run_error
from warploom.train.monitor import Monitor
from warploom.train.trainer import Trainer


@pytest.mark.parametrize("name", ["small", "transformer-base"])
def test_what_each_block_adds_is_extrapolated(name):
    model = preset(name)

    def seconds(config):
        encoder = config.encoder_layers if config.architecture == "encoder-decoder" else 0
        return 5.0 + 2.0 * config.num_layers + 3.0 * encoder

    found = depths(model)
    assert extrapolate([seconds(config) for config, _ in found], [n for _, n in found]) == seconds(model)


def test_measuring_gives_times_that_grow_with_the_batch():
    workload = Workload(preset("nano"), 1e6, 32, 8, torch.float32)
    one = measure(workload, Layout(micro_batch_size=8), torch.device("cpu"))
    assert one.passes > 0 and one.update > 0


def test_a_finished_run_is_compared(tmp_path):
    config = toy_config(tmp_path, steps=3)
    Trainer(toy_model(config), ToyData(counting), config, monitor=Monitor(tmp_path)).fit()
    found = run_error(tmp_path)
    assert found.forecast_bytes > 0 and found.forecast_s > 0 and found.step_s > 0 and found.peak_bytes >= 0
    assert "forecast and" in str(found) and "taken (" in str(found)
    with pytest.raises(UserError, match="holds no metrics.jsonl"):
        run_error(tmp_path / "elsewhere")


def test_the_copy_for_saves_in_the_background_is_as_large_as_forecast(tmp_path):
    config = toy_config(tmp_path, steps=2)
    trainer = Trainer(toy_model(config), ToyData(counting), config)
    trainer.fit()
    workload = Workload(config.model, 1e6, 16, 8, torch.float32, config.optimizer)
    forecast = checkpoint_copy_bytes(workload, Layout(micro_batch_size=4), "cpu")
    assert forecast > 200_000
    copied = trainer._saver._background._memory.numel()
    assert 0 <= copied - forecast < 20_000  # random states, and gaps between tensors


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.preset)
def test_published_runs_are_within_a_factor_of_two(run):
    found = reckon(run)
    assert found.fits and 0.5 < found.device_hours / run.device_hours < 2
