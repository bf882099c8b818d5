"""`warploom verify` proves every op on every back end and level that is here, and a wrong op fails it."""

from __future__ import annotations

import sys

import pytest
import torch

from warploom.cli.main import main
from warploom.ops import REGISTRY, _extension, _proof
from warploom.ops._op import Backend
from warploom.ops._proof import prove, prove_all

LEVELS = _extension.usable_levels() if _extension.missing is None else []
CPU_EXTENSION = pytest.mark.skipif(_extension.missing is not None, reason=str(_extension.missing))


@pytest.fixture
def op(monkeypatch):
    """A record cut down to its first two cases, 6 with their dtypes."""
    op = REGISTRY["rms_norm"]
    monkeypatch.setattr(op, "cases", op.cases[:2])
    return op


def test_a_right_op_passes_at_every_level(capsys):
    """Each level's row comes from a process that ran at that level."""
    assert main(["verify", "--op", "rms_norm"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith("rms_norm")]
    assert [row[2] for row in rows] == ["cpu", *LEVELS]
    dtypes = sum(len(case.dtypes) for case in REGISTRY["rms_norm"].cases)
    for _, back_end, _, cases, error, verdict in rows:
        assert back_end in ("reference", "cpu") and int(cases) == dtypes and verdict == "right"
        assert 0 < float(error) <= 1
    assert f"{len(rows) * dtypes} cases, 0 failures" in lines[-1]


def test_a_wrong_op_fails_and_is_named(monkeypatch, capsys, op):
    monkeypatch.setattr(_extension, "missing", "not built")  # a bug planted here is not in other processes
    assert main(["verify", "--op", "rms_norm"]) == 0
    right = op.function
    monkeypatch.setattr(op, "function", lambda x, weight, **rest: right(x * 1.05, weight * 0.9, **rest))
    assert main(["verify", "--op", "rms_norm"]) == 1
    output = capsys.readouterr().out
    assert "WRONG in 6" in output
    assert "rms_norm on reference at cpu: tiny, float32: output 0: max error" in output


def test_an_unknown_op_is_refused(capsys):
    assert main(["verify", "--op", "rotery"]) == 2
    assert "no op is called 'rotery'; did you mean 'rotary'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("check", "words"), [("check_deterministic", "two runs differ"), ("check_writes_everything", "never written")]
)
def test_each_check_counts(monkeypatch, op, check, words):
    """The proof fails when one of its checks does, and says in which case."""
    assert prove(op, "reference", "cpu").failures == ()

    def refute(*arguments):
        raise _proof.Refuted(words)

    monkeypatch.setattr(_proof, check, refute)
    proof = prove(op, "reference", "cpu")
    assert len(proof.failures) == proof.cases == 6
    assert proof.failures[0] == f"tiny, float32: {words}"


def test_refused_arguments_are_counted(monkeypatch, op):
    reference = op.backends["reference"]
    refuses = {"fwd": lambda x, *rest: "no bfloat16" if x.dtype == torch.bfloat16 else None}
    monkeypatch.setitem(op.backends, "reference", Backend(reference.kernels, reference.devices, refuses=refuses))
    proof = prove(op, "reference", "cpu")
    assert (proof.cases, proof.refused, proof.failures) == (6, 2, ())


@CPU_EXTENSION
def test_a_process_that_dies_fails_the_op(monkeypatch, op):
    """A kernel that crashes takes its process with it; that is a failure at that level, not a lost row."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    proofs = [proof for proof in prove_all([op]) if proof.backend == "cpu"]
    assert [proof.level for proof in proofs] == LEVELS
    for proof in proofs:
        (failure,) = proof.failures
        assert "ended with code 1 before this op was through" in failure


@pytest.mark.usefixtures("op")
def test_without_the_extension_the_reference_is_proved(monkeypatch, capsys):
    monkeypatch.setattr(_extension, "missing", "the compiled extension was not built: no C++ compiler found")
    assert main(["verify", "--op", "rms_norm"]) == 0
    output = capsys.readouterr().out
    assert "reference" in output and "no C++ compiler found" in output and "portable" not in output
