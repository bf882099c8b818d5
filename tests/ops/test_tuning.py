"""The back end that was measured as the fastest serves. The card and the timer are faked: the CPU is the card here."""

import json

import pytest
import torch

from warploom.cli import doctor, tune
from warploom.ops import REGISTRY, _extension, _tuning, adamw, backend, layer_norm

pytestmark = pytest.mark.skipif(_extension.missing is not None, reason=str(_extension.missing))
OP = REGISTRY["layer_norm"]


@pytest.fixture
def path(tmp_path, monkeypatch):
    path = tmp_path / "tuned" / "card.backends.json"
    monkeypatch.setattr(_tuning, "MEASURED_DEVICES", {"cpu"})
    monkeypatch.setattr(_tuning, "file", lambda index=0: path)
    monkeypatch.setattr(_tuning, "_measure", lambda call: pytest.fail("measured unasked"))
    _tuning.entries_of.cache_clear()
    yield path
    _tuning.entries_of.cache_clear()


@pytest.fixture
def slow(monkeypatch):
    """Names of back ends that measure as slow; the others as fast. Calls run, as a timer would run them."""
    names = set()

    def measure(call):
        before = sum((op.calls for op in REGISTRY.values()), start=type(OP.calls)())
        call()
        assert before == sum((op.calls for op in REGISTRY.values()), start=type(OP.calls)())
        kernel = call.func
        owners = {name for op in REGISTRY.values() for name, b in op.backends.items() if kernel in b.kernels.values()}
        return 2.0 if owners & names else 1.0

    monkeypatch.setattr(_tuning, "_measure", measure)
    return names


def who_runs(rows=3):
    before = OP.calls.copy()
    layer_norm(torch.ones(rows, 4), torch.ones(4))
    (key,) = OP.calls - before
    return key.partition("/")[2]


def test_without_a_file_the_defaults_serve_and_nothing_is_measured(path):
    assert who_runs() == "cpu"
    assert not path.exists()


def test_the_fastest_serves_in_the_next_process_too(path, slow):
    slow.add("cpu")
    with _tuning.tuning():
        assert who_runs() == "reference"
    (entry,) = json.loads(path.read_text()).values()
    assert entry == {"winner": "reference", "us": {"cpu": 2000.0, "reference": 1000.0}}
    _tuning.entries_of.cache_clear()  # as a new process reads it
    slow.clear()
    assert who_runs() == "reference"
    assert who_runs(rows=4) == "reference"  # the same up to a power of 2
    assert who_runs(rows=5) == "cpu"  # not on file


def test_a_measured_one_is_taken_though_its_record_calls_it_slower(path, slow):
    """float32 products of many rows are left to torch by the CPU's defaults."""
    op = REGISTRY["linear"]
    x, weight = torch.ones(20, 3), torch.ones(4, 3)
    op.calls.clear()
    op.function(x, weight)
    assert set(op.calls) == {"fwd/reference"}
    slow.add("reference")
    with _tuning.tuning():
        op.function(x, weight)
    assert set(op.calls) == {"fwd/reference", "fwd/cpu"}


def test_a_forced_back_end_comes_before_what_was_measured(path, slow):
    slow.add("cpu")
    with _tuning.tuning():
        who_runs()
    with backend(layer_norm="cpu"):
        assert who_runs() == "cpu"


@pytest.mark.parametrize("name", ["abacus", "triton"])
def test_a_winner_that_cannot_serve_counts_for_nothing(path, slow, name):
    with _tuning.tuning():
        who_runs()
    ((key, entry),) = json.loads(path.read_text()).items()
    path.write_text(json.dumps({key: {**entry, "winner": name}}))
    _tuning.entries_of.cache_clear()
    assert who_runs() == "cpu"


def test_measuring_does_not_step_the_weights(path, slow):
    def step():
        lists = [[torch.full((5,), value)] for value in (1.0, 0.5, 0.0, 0.0)]
        settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8}
        adamw(*lists, [], [torch.zeros(())], **settings)
        return lists[0][0]

    expected = step()
    with _tuning.tuning():
        assert torch.equal(step(), expected)
    assert "adamw_step" in path.read_text()


def test_doctor_and_tune_show_what_was_measured(path, slow):
    slow.add("cpu")
    with _tuning.tuning():
        who_runs()
        who_runs(rows=30)
    rows = {(name, device): why for name, device, _, why in doctor.op_rows()}
    assert "of 2 kinds of call measured on this card the fastest is: reference 2" in rows["layer_norm", "cpu"]
    assert "measured on this card" not in rows["rms_norm", "cpu"]
    lines = tune.report(_tuning.entries_of(0))
    assert len(lines) == 2 and all("reference 1000 us, cpu 2000 us" in line for line in lines)


@pytest.mark.parametrize("content", ["{", "[1]", '{"layer_norm_fwd": 3}'])
def test_a_damaged_file_is_said_and_counts_for_nothing(path, content):
    path.parent.mkdir()
    path.write_text(content)
    with pytest.warns(UserWarning, match="card.backends.json is damaged.*run `warploom tune` again"):
        assert who_runs() == "cpu"
