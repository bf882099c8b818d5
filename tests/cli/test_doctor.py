"""`warploom doctor` names what was built, what is here and which back end each op uses."""

from __future__ import annotations

import pytest
import torch

from warploom.cli.doctor import Command, extension_rows, level_rows, machine_rows, op_rows
from warploom.ops import REGISTRY, _extension, backend

CPU_EXTENSION = pytest.mark.skipif(_extension.missing is not None, reason=str(_extension.missing))


def rows_of_ops() -> dict[tuple[str, str], tuple[str, str]]:
    return {(name, device): (chosen, why) for name, device, chosen, why in op_rows()}


def test_every_op_has_a_row_with_the_back_end_that_runs():
    rows = rows_of_ops()
    assert {name for name, _ in rows} == set(REGISTRY)
    op = REGISTRY["layer_norm"]
    op.calls.clear()
    op.function(torch.ones(2, 4), torch.ones(4))
    assert op.calls == {f"fwd/{rows['layer_norm', 'cpu'][0]}": 1}


def test_each_other_back_end_has_its_reason():
    for (name, _), (chosen, why) in rows_of_ops().items():
        for other in REGISTRY[name].backends:
            assert (f"not {other}: " in why) == (other != chosen)


@CPU_EXTENSION
def test_what_is_left_to_torch_is_said():
    rows = {row[0]: row[3] for row in op_rows() if row[1] == "cpu"}
    for name, op in REGISTRY.items():
        leaves = bool(op.backends["cpu"].slower) if "cpu" in op.backends else False
        assert ("leaves to torch, by measurement: " in rows[name]) == leaves, name


def test_a_demanded_back_end_is_shown_even_if_it_cannot_be_used():
    with backend("reference"):
        chosen, why = rows_of_ops()["layer_norm", "cpu"]
    assert chosen == "reference" and why.startswith("demanded by WARPLOOM_BACKEND")
    with backend("cuda"):
        chosen, why = rows_of_ops()["layer_norm", "cpu"]
    assert chosen == "cuda" and "cannot be used" in why


def test_missing_extension_is_explained(monkeypatch):
    monkeypatch.setattr(_extension, "missing", "the compiled extension was not built: no C++ compiler found")
    monkeypatch.setattr(_extension, "build_record", lambda: {"built": False, "levels": [], "left_out": {}})
    chosen, why = rows_of_ops()["layer_norm", "cpu"]
    assert chosen == "reference" and "not cpu: the compiled extension was not built: no C++ compiler found" in why
    assert dict(extension_rows())["state"].endswith("no C++ compiler found")
    assert dict(level_rows()) == {"processor": "not asked"}


@CPU_EXTENSION
def test_levels_show_the_one_in_use_and_those_left_out(monkeypatch):
    record = {**_extension.build_record(), "left_out": {"imaginary": "unrecognized option"}}
    monkeypatch.setattr(_extension, "build_record", lambda: record)
    states = dict(level_rows())
    assert states[_extension.level()] == "in use"
    assert states["imaginary"] == "left out, the compiler cannot: unrecognized option"
    assert all(states[level].startswith(("built", "in use")) for level in record["levels"])


def test_output_in_a_pipe_is_plain_and_unwrapped(capsys):
    Command().run()
    output = capsys.readouterr().out
    assert "\x1b" not in output and output.isascii()
    assert f"torch    {torch.__version__}" in output
    for name in REGISTRY:
        assert any(line.startswith(name) for line in output.splitlines())


def test_machine_names_its_threads():
    assert dict(machine_rows())["threads"].startswith(str(torch.get_num_threads()))
