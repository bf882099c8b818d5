"""No code of the package can unpickle, evaluate or run text: checked on its syntax trees, without exceptions."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path for root in ("engine/warploom", "kernels/warploom_kernels") for path in (ROOT / root).rglob("*.py")
)
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
NAMES = {"eval", "exec", "__import__"}
ATTRIBUTES = {
    ("torch", "load"),
    ("torch", "save"),
    ("yaml", "load"),
    ("yaml", "unsafe_load"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("os", "system"),
    ("os", "popen"),
    ("shutil", "unpack_archive"),
}
KEYWORDS = {"allow_pickle", "shell"}
UNPACKING = {"extract", "extractall"}  # of tarfile: members are read as streams and never put where they say


def dangers(source):
    """List what a source uses that could run code from data."""
    found = []
    tree = ast.parse(source)
    reads_archives = any(
        isinstance(node, ast.Import | ast.ImportFrom)
        and "tarfile" in {getattr(node, "module", None), *(alias.name for alias in node.names)}
        for node in ast.walk(tree)
    )
    for node in ast.walk(tree):
        if reads_archives and isinstance(node, ast.Attribute) and node.attr in UNPACKING:
            found.append(f".{node.attr}")
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            names = [alias.name for alias in node.names]
            for name in [origin, *names]:
                if name.split(".")[0] in MODULES:
                    found.append(f"import {name}")
            found += [f"{origin}.{name}" for name in names if (origin, name) in ATTRIBUTES]
        elif isinstance(node, ast.Name) and node.id in NAMES:
            found.append(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in ATTRIBUTES:
                found.append(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.keyword) and node.arg in KEYWORDS:
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                found.append(f"{node.arg}=")
    return found


# What runs the programs that a model wrote, locked in: tests/evaluation/test_sandbox.py.
RUNS_PROGRAMS = {"engine/warploom/evaluation/sandbox_child.py": ["exec"]}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_is_free_of_them(path):
    assert dangers(path.read_text(encoding="utf-8")) == RUNS_PROGRAMS.get(path.relative_to(ROOT).as_posix(), [])


def test_the_package_was_found():
    assert Path("engine/warploom/checkpoint/load.py") in {path.relative_to(ROOT) for path in SOURCES}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, pickle as p",
        "from pickle import loads",
        "from torch import load",
        "import torch\nstate = torch.load('x', weights_only=True)",
        "torch.save({}, 'x')",
        "def f():\n    return eval('1')",
        "run = exec",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "subprocess.run(command, shell=True)",
        "yaml.load(text)",
        "__import__('pickle')",
        "import tarfile\ntarfile.open(path).extractall(folder, filter='data')",
        "from tarfile import TarFile\nTarFile(path).extract(member)",
    ],
)
def test_planted(source):
    assert dangers(source) != []


def test_what_only_looks_alike():
    assert dangers("model.eval()\nnp.load(path, allow_pickle=False)\njson.load(f)\nload_checkpoint(p)\nimport re") == []
    assert dangers("import tarfile\ntarfile.open(fileobj=stream, mode='r|').extractfile(member)") == []
