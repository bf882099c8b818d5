"""What of bench.gpu runs without a card: its parts fail alone, its budget holds, its exit code tells."""

import json
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from bench import gpu, gpu_checks, gpu_work

from warploom.ops import REGISTRY


def test_without_a_card_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main([]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err


@pytest.fixture
def card(monkeypatch):
    """As if there were one of compute capability 9.0, and what setup.py was called with."""
    calls = []

    def call(command, **options):
        calls.append((command, options))
        return subprocess.CompletedProcess(command, card.returncode, stdout="compiling", stderr="no ninja")

    card = SimpleNamespace(calls=calls, returncode=0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(subprocess, "run", call)
    return card


def test_kernels_that_are_missing_are_compiled_for_the_card_alone(card, monkeypatch):
    monkeypatch.setattr(gpu._extension, "why_cuda_missing", lambda: "it was built for sm_80")
    assert gpu.built()
    ((command, options),) = card.calls
    assert command[1:] == ["setup.py", "build_ext", "--inplace"] and (options["cwd"] / "setup.py").exists()
    assert options["env"]["WARPLOOM_CUDA_ARCHS"] == "90a"


def test_those_that_are_there_are_not(card, monkeypatch):
    monkeypatch.setattr(gpu._extension, "why_cuda_missing", lambda: None)
    assert not gpu.built() and card.calls == []


def test_a_build_that_fails_is_shown_and_ends_nothing(card, monkeypatch, capsys):
    card.returncode = 1
    monkeypatch.setattr(gpu._extension, "why_cuda_missing", lambda: "it was built for sm_80")
    assert not gpu.built()
    assert "it failed, and they are left out:\ncompiling" in capsys.readouterr().out


def test_a_part_that_fails_is_reported_and_the_rest_goes_on(tmp_path, capsys):
    report = gpu.Report(deadline=time.monotonic() + 100)
    row = {"op": "linear", "shape": "8x8", "subject": "triton", "us": 12.5, "share_of_ceiling": 0.5}

    def fails():
        raise RuntimeError("illegal memory access")

    report.part("first", fails)
    report.part("second", lambda: report.rows.append(row))
    path = tmp_path / "gpu.json"
    assert gpu.finish(report, "a card", path) == 1
    said = capsys.readouterr()
    assert "FAILED: first: RuntimeError" in said.err and "illegal memory access" in said.err
    assert "12.5 us" in said.out and "0.50 of ceiling" in said.out
    assert json.loads(path.read_text())["rows"] == [row]


def test_without_failures_it_returns_zero():
    assert gpu.finish(gpu.Report(deadline=0.0), "a card", None) == 0


def test_what_the_budget_does_not_reach_is_named(capsys):
    report = gpu.Report(deadline=time.monotonic() - 1)
    report.part("training step", lambda: pytest.fail("it ran"))
    assert gpu.finish(report, "a card", None) == 0
    assert "no time left for: training step" in capsys.readouterr().out


def test_rivals_that_are_not_installed_are_no_subjects(monkeypatch):
    monkeypatch.setattr(gpu_work, "_installed", lambda module: None)
    assert not gpu_work.attention_rivals() and not gpu_work.norm_rivals("layer_norm") and not gpu_work.glu_rivals()


def test_a_rival_is_called_in_its_own_layout(monkeypatch):
    """flash-attn takes (B, T, H, D)."""

    class FlashAttn:
        @staticmethod
        def flash_attn_func(q, k, v, causal):
            assert q.shape == (2, 16, 4, 8) and causal
            o = torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
            )
            return o.transpose(1, 2)

    monkeypatch.setattr(gpu_work, "_installed", lambda module: FlashAttn if module == "flash_attn" else None)
    rivals = gpu_work.attention_rivals()
    assert list(rivals) == ["flash-attn"]
    q, k, v = torch.randn(3, 2, 4, 16, 8)
    expected = REGISTRY["attention"].reference(q, k, v, causal=True)
    torch.testing.assert_close(rivals["flash-attn"](q, k, v, causal=True), expected)


def passes(monkeypatch, peers, *, together=False):
    monkeypatch.setattr(gpu_work, "gpu_backends", lambda name: ["reference"])
    x, weight = torch.randn(3, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    arguments = {"x": x, "weight": weight}
    return list(gpu_work._passes("rms_norm", "3x8", peers, arguments, [x, weight], (0, 0), (10, 20), together=together))


def test_forward_and_backward_are_timed_apart_or_together(monkeypatch):
    peers = {"torch": REGISTRY["rms_norm"].torch_peer}
    forward, backward = passes(monkeypatch, peers)
    assert (forward.bytes, backward.bytes) == (10, 20)
    for work in (forward, backward):
        assert list(work.subjects) == ["reference", "torch"]
    assert not forward.subjects["reference"]().requires_grad
    for a, b in zip(backward.subjects["torch"](), backward.subjects["torch"](), strict=True):
        assert torch.equal(a, b)
    (both,) = passes(monkeypatch, peers, together=True)
    assert both.bytes == 30 and len(both.subjects["torch"]()) == 2


def test_a_rival_that_fails_is_named_and_the_rest_is_timed(monkeypatch, capsys):
    def fails(x, weight):
        raise TypeError("missing argument")

    forward, _ = passes(monkeypatch, {"rival": fails})
    assert list(forward.subjects) == ["reference"]
    assert "rival fails: TypeError: missing argument" in capsys.readouterr().out


def test_every_back_end_has_a_case_to_be_captured():
    """The kernels for 16-bit products refuse the first ones: widths of a few elements, and float32."""
    for name, op in REGISTRY.items():
        if "cuda" not in op.backends or op.mutates:
            continue
        trials = list(gpu_checks.graph_trials(name))
        assert trials[0].dtype == torch.float32
        assert all(value.numel() for trial in trials for value in trial.inputs.values() if torch.is_tensor(value))
    trials = {(trial.inputs["q"].shape[-1], trial.dtype) for trial in gpu_checks.graph_trials("attention")}
    assert (64, torch.bfloat16) in trials


def test_an_op_that_does_not_launch_is_a_failure_and_other_cases_go_on(monkeypatch, capsys):
    seen = []

    def fails(op, back_end, trial, layout):
        seen.append(trial.dtype)
        raise RuntimeError("CUDA: invalid argument")

    monkeypatch.setattr(gpu_checks, "gpu_backends", lambda name: ["cuda", "triton"])
    monkeypatch.setattr(gpu_checks, "check_accuracy", fails)
    wrong = list(gpu_checks.accuracy("rms_norm", float("inf"), most=1))
    assert len(wrong) == len(seen) == 2 * len(REGISTRY["rms_norm"].cases[0].dtypes)
    assert "rms_norm on cuda" in wrong[0] and "RuntimeError: CUDA: invalid argument" in wrong[0]
    assert f"0 right, {len(wrong) // 2} wrong" in capsys.readouterr().out


def test_without_the_sanitizer_that_is_said(monkeypatch, capsys):
    monkeypatch.setattr(gpu_checks.shutil, "which", lambda name: None)
    assert gpu_checks.sanitizer(1.0) is None
    assert "not installed" in capsys.readouterr().out


@pytest.mark.parametrize("code", [0, 9])
def test_the_sanitizer_runs_without_torchs_cache(monkeypatch, capsys, code):
    calls = []

    def run(command, *, env, **options):
        calls.append((command, env))
        return gpu_checks.subprocess.CompletedProcess(command, code, "Invalid __global__ read of size 4", "")

    monkeypatch.setattr(gpu_checks.shutil, "which", lambda name: "/opt/compute-sanitizer")
    monkeypatch.setattr(gpu_checks.subprocess, "run", run)
    wrong = gpu_checks.sanitizer(1.0)
    ((command, environment),) = calls
    assert environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1" and command[0] == "/opt/compute-sanitizer"
    assert (wrong is None) == (code == 0)
    assert ("Invalid __global__ read" in capsys.readouterr().out) == (code == 9)
