"""Forcing a back end: what is asked for is what runs, or an error says why not."""

import os
import subprocess
import sys

import pytest
import torch

import warploom
from warploom.errors import UserError
from warploom.ops import REGISTRY, _op, backend
from warploom.ops._op import BackendUnavailable, force_from_environment
from warploom.ops.rotary import rotary

OP = REGISTRY["rotary"]


def run():
    before = OP.calls.copy()
    rotary(torch.ones(1, 1, 1, 2), torch.zeros(1, dtype=torch.int64))
    (key,) = OP.calls - before
    return key


def test_one_op_and_all_ops():
    assert warploom.ops.backend is backend
    with backend("reference"):
        assert _op._forced == {"*": "reference"}
        with backend(attention="reference"):
            assert _op._forced == {"*": "reference", "attention": "reference"}
        with backend("triton"):
            assert _op._forced == {"*": "triton"}
    assert _op._forced == {}


def test_the_block_ends_with_an_error_too():
    with pytest.raises(KeyError), backend("reference"):
        raise KeyError
    assert _op._forced == {}


def test_a_missing_back_end_is_an_error():
    assert run() == "fwd/" + OP.choice("cpu")
    for error in (BackendUnavailable, UserError, RuntimeError):
        with backend(rotary="cuda"), pytest.raises(error, match="'cuda' was asked for, but rotary_fwd cannot use it: "):
            run()


def test_a_back_end_of_another_device_is_an_error(monkeypatch):
    monkeypatch.setitem(OP.backends, "cuda", _op.Backend(OP.backends["reference"].kernels, devices=("cuda",)))
    with backend(rotary="cuda"), pytest.raises(BackendUnavailable, match="it runs on cuda, not on cpu"):
        run()


def test_unknown_names():
    with (
        pytest.raises(ValueError, match="no back end is called 'refrence'; did you mean 'reference'"),
        backend("refrence"),
    ):
        pass
    with pytest.raises(ValueError, match="no op is called 'rotery'; did you mean 'rotary'"), backend(rotery="cpu"):
        pass


@pytest.mark.parametrize(
    ("text", "forced"),
    [
        ("", {}),
        ("reference", {"*": "reference"}),
        ("attention=cpu,layer_norm=reference", {"attention": "cpu", "layer_norm": "reference"}),
        (" reference , rotary = cuda ,", {"*": "reference", "rotary": "cuda"}),
    ],
)
def test_environment(monkeypatch, text, forced):
    monkeypatch.setattr(_op, "_forced", {})
    monkeypatch.setenv("WARPLOOM_BACKEND", text)
    force_from_environment()
    assert _op._forced == forced


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gpu", "WARPLOOM_BACKEND: no back end is called 'gpu'; did you mean 'cpu'"),
        ("layernorm=cpu", "WARPLOOM_BACKEND: no op is called 'layernorm'; did you mean 'layer_norm'"),
        ("=cpu", "WARPLOOM_BACKEND: no op is called ''"),
    ],
)
def test_environment_with_a_mistake(monkeypatch, text, words):
    monkeypatch.setenv("WARPLOOM_BACKEND", text)
    with pytest.raises(UserError, match=words):
        force_from_environment()


def test_environment_is_read_on_import():
    """In a fresh process, as a user sets it."""
    code = "import torch, warploom.ops as ops\nops.rotary(torch.ones(1, 1, 1, 2), torch.zeros(1, dtype=torch.int64))\n"
    for text, words in (("rotary=reference", None), ("rotary=cuda", "back end 'cuda' was asked for")):
        env = {**os.environ, "WARPLOOM_BACKEND": text, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        if words is None:
            assert done.returncode == 0, done.stderr
        else:
            assert done.returncode != 0 and words in done.stderr


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_a_block_inside_compiled_code_is_an_error():
    """There it would end before the graph runs, and so force nothing."""

    def call(x):
        with backend("reference"):
            return rotary(x, torch.zeros(1, dtype=torch.int64))

    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(call, fullgraph=True, backend="eager")(torch.ones(1, 1, 1, 2))
    torch._dynamo.reset()
    before = OP.calls.copy()
    torch.compile(call, backend="eager")(torch.ones(1, 1, 1, 2))  # without fullgraph it runs eagerly
    assert set(OP.calls - before) == {"fwd/reference"}
    torch._dynamo.reset()
