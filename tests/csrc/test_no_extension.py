"""Without the compiled extension the package works on the reference path, and says so."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

BLOCK_EXTENSION = "import sys; sys.modules['warploom._C'] = None\n"  # makes its import an ImportError
USE_LAYER_NORM = """
import torch
from warploom.ops import REGISTRY, backend, layer_norm
x = torch.arange(8.0).reshape(2, 4).requires_grad_()
y = layer_norm(x, torch.ones(4))
y.sum().backward()
torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (4,)))
print(sorted(REGISTRY["layer_norm"].calls))
try:
    with backend("cpu"):
        layer_norm(x, torch.ones(4))
except RuntimeError as error:
    print(error)
from warploom.cli.doctor import Command
Command().run()
"""


def run_python(*arguments: str, cwd: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(str(REPOSITORY / root) for root in ("engine", "kernels"))
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": paths, "WARPLOOM_BACKEND": "", **environment},
    )


def test_reference_path_works_and_is_named():
    result = run_python("-c", BLOCK_EXTENSION + USE_LAYER_NORM)
    assert result.returncode == 0, result.stderr
    calls, refusal, *doctor = result.stdout.splitlines()
    assert calls == "['bwd/reference', 'fwd/reference']"
    assert "back end 'cpu' was asked for" in refusal and "extension does not load" in refusal
    row = next(line for line in doctor if line.startswith("layer_norm "))
    assert row.split()[:3] == ["layer_norm", "cpu", "reference"]
    assert "not cpu: the compiled extension does not load" in row


def test_control_with_the_extension_the_same_script_runs_the_kernels():
    from warploom.ops import _extension

    if _extension.missing is not None:
        pytest.skip(_extension.missing)
    result = run_python("-c", USE_LAYER_NORM)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == "['bwd/cpu', 'fwd/cpu']"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What setup.py needs, away from this checkout's own build."""
    for name in ("setup.py", "pyproject.toml", "csrc"):
        source = REPOSITORY / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    (tmp_path / "README.md").write_text("# warploom\n")
    (tmp_path / "LICENSE").write_text("\n")
    for package in ("engine/warploom", "kernels/warploom_kernels"):
        (tmp_path / package).mkdir(parents=True)
        (tmp_path / package / "__init__.py").touch()
    return tmp_path


def build(checkout: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    result = run_python("setup.py", "-q", "build_ext", "--inplace", cwd=checkout, **environment)
    record = checkout / "engine/warploom/_build.json"
    return result, json.loads(record.read_text()) if record.exists() else {}


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"WARPLOOM_NO_EXTENSION": "1"}, "WARPLOOM_NO_EXTENSION=1 was set"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler found (no-such-compiler); on Debian: apt-get install g++"),
    ],
)
def test_install_without_what_it_takes_to_compile(checkout, environment, reason):
    stale = checkout / "engine/warploom" / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    stale.touch()
    result, record = build(checkout, **environment)
    assert result.returncode == 0, result.stderr
    assert f"installed without its compiled kernels: {reason}" in result.stderr
    assert record["built"] is False and record["reason"].startswith(reason) and record["levels"] == []
    assert not stale.exists()


def compiler_that_fails_on(word: str, folder: Path) -> str:
    """A compiler that refuses any command line holding the word."""
    path = folder / "compiler"
    path.write_text(f'#!/bin/sh\ncase "$*" in *{word}*) echo "refused: {word}" >&2; exit 1;; esac\nexec c++ "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
def test_a_compile_error_fails_the_install(checkout, tmp_path):
    result, record = build(checkout, CXX=compiler_that_fails_on("csrc", tmp_path))
    assert result.returncode != 0
    assert "compiling csrc/ failed" in result.stderr and "refused: csrc" in result.stdout + result.stderr
    assert record == {}


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
def test_a_level_the_compiler_cannot_do_is_left_out_with_its_reason(tmp_path):
    spec = importlib.util.spec_from_file_location("warploom_setup", REPOSITORY / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    flags = {"portable": "", "avx2": "-mavx2", "amx": "-mno-such-thing"}
    setup.LEVELS = {"this": flags}
    levels, left_out = setup.probe_levels(compiler_that_fails_on("no-such", tmp_path), "this")
    assert "portable" in levels and "amx" not in levels
    assert left_out["amx"] == "refused: no-such"
