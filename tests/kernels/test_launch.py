"""Which configuration a launch takes: what is on file, the first of the list, or, asked to, what measures fastest."""

import importlib.util
import json

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import torch

from warploom_kernels import _launch
from warploom_kernels._launch import Config

CONFIGS = [Config({"BLOCK": block}, num_warps=4) for block in (32, 64, 128)]
CARD = torch.device("cuda", 0)


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    path = tmp_path / "tuned" / "card.kernels.json"
    monkeypatch.setattr(_launch, "tuned_file", lambda index=0: path)
    monkeypatch.setattr(_launch, "_measure", lambda run: run())
    _launch._entries.cache_clear()
    yield path
    _launch._entries.cache_clear()


def choose(times_ms):
    return _launch._chosen("kernel key", CONFIGS, lambda config: times_ms[config.constants["BLOCK"]], CARD)


def test_without_a_file_the_first_serves_and_nothing_is_measured(tuned):
    assert _launch._chosen("kernel key", CONFIGS, lambda config: pytest.fail("measured"), CARD) is CONFIGS[0]
    assert not tuned.exists()


def test_tuning_keeps_the_fastest_for_the_next_process(tuned):
    with _launch.tuning():
        assert choose({32: 3.0, 64: 1.0, 128: 2.0}) is CONFIGS[1]
    assert json.loads(tuned.read_text())["kernel key"] == {"BLOCK": 64, "num_warps": 4, "num_stages": 1}
    _launch._entries.cache_clear()  # as a new process reads it
    assert _launch._chosen("kernel key", CONFIGS, lambda config: pytest.fail("measured"), CARD) is CONFIGS[1]


def test_an_entry_that_no_longer_ships_counts_for_nothing(tuned):
    tuned.parent.mkdir()
    tuned.write_text(json.dumps({"kernel key": {"BLOCK": 999, "num_warps": 4, "num_stages": 1}}))
    assert choose({32: 1.0, 64: 2.0, 128: 3.0}) is CONFIGS[0]


@pytest.mark.parametrize("content", ["{", "", "[1]", "\x00\xff"])
def test_a_damaged_file_is_said_and_written_anew(tuned, content):
    tuned.parent.mkdir()
    tuned.write_text(content, encoding="latin-1")
    with pytest.warns(UserWarning, match="card.kernels.json is damaged.*run `warploom tune` again"):
        assert _launch._chosen("kernel key", CONFIGS, lambda config: pytest.fail("measured"), CARD) is CONFIGS[0]
    with _launch.tuning():
        choose({32: 3.0, 64: 1.0, 128: 2.0})
    assert json.loads(tuned.read_text())["kernel key"]["BLOCK"] == 64


def test_sizes_share_a_key_up_to_a_power_of_2():
    assert _launch.power_of_2_key(1000, 768) == _launch.power_of_2_key(1024, 1024) != _launch.power_of_2_key(1025, 768)
