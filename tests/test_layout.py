"""The rules of docs/architecture.md that a machine can check; `make lint` holds the layers."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from warploom.ops import REGISTRY

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (ROOT / "engine" / "warploom", ROOT / "kernels" / "warploom_kernels")
MODULES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "misc", "common"}


def module_name(path):
    root = next(package.parent for package in PACKAGES if package in path.parents)
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def test_the_tree_is_the_one_that_is_checked():
    assert len(MODULES) > 50 and len(SOURCES) > 10


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_torch_headers_stay_in_the_bindings(path):
    includes = re.findall(r'#include\s*[<"](?:torch|ATen|c10)/', path.read_text(encoding="utf-8"))
    assert not includes or path.parent == ROOT / "csrc" / "bindings"


def op_files():
    return {path.stem for path in (PACKAGES[0] / "ops").glob("*.py") if not path.stem.startswith("_")}


def test_every_op_file_has_its_record_with_a_reference():
    assert op_files() == set(REGISTRY)
    for name, op in REGISTRY.items():
        assert op.function.__name__ == name and op.reference.__name__ == f"{name}_reference"
        assert "reference" in op.backends and op.cases and op.bad_cases and op.bench_cases
        assert op.function.__doc__


def test_no_kernel_file_is_an_orphan():
    triton = {path.stem for path in PACKAGES[1].glob("*.py") if not path.stem.startswith("_")}
    bindings = {path.stem for path in (ROOT / "csrc" / "bindings").glob("*.cpp")}
    units = {re.sub("_(fwd|bwd)$", "", path.stem) for path in (ROOT / "csrc" / "cpu").glob("*.cpp")}
    cuda = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert triton <= op_files() and units <= op_files() and units <= bindings
    assert {f"{stem}_cuda" for stem in cuda} == {stem for stem in bindings if stem.endswith("_cuda")}
    assert {name for name, op in REGISTRY.items() if "cuda" in op.backends} == cuda
    assert {name for name, op in REGISTRY.items() if "triton" in op.backends} == triton
    made_of_others = {"linear_glu"}  # on the CPU: two calls of linear's kernels
    assert {name for name, op in REGISTRY.items() if "cpu" in op.backends} == units | made_of_others


def test_no_file_has_a_name_that_says_nothing():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    assert len(files) > 100
    assert [name for name in files if Path(name).stem in FORBIDDEN_NAMES] == []


def banned_calls(tree):
    """What reads data as code, runs a shell, or hides an error: (line, what)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            if any(name.split(".")[0] in {"pickle", "cPickle", "dill", "marshal", "shelve", "yaml"} for name in names):
                yield node.lineno, "import of a format that runs code"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in {"eval", "exec", "torch.load", "torch.save", "os.system", "compile"}:
                yield node.lineno, called
            for keyword in node.keywords:
                if keyword.arg in {"shell", "allow_pickle"} and ast.unparse(keyword.value) != "False":
                    yield node.lineno, keyword.arg
        elif isinstance(node, ast.ExceptHandler):
            caught = "everything" if node.type is None else ast.unparse(node.type)
            if caught in {"everything", "Exception", "BaseException"} and not any(
                isinstance(inner, ast.Raise) for inner in ast.walk(node)
            ):
                yield node.lineno, f"except {caught} without raise"


# Running a program that a model wrote is the whole purpose of this file; an error of the program is its result.
MAY_RUN_CODE = {"warploom.evaluation.sandbox_child": {"exec", "compile", "except BaseException without raise"}}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_nothing_unpickles_evaluates_or_swallows(path):
    allowed = MAY_RUN_CODE.get(module_name(path), set())
    found = {what for _, what in banned_calls(ast.parse(path.read_text(encoding="utf-8")))}
    assert found - allowed == set()


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "x = torch.load(path)",
        "eval(text)",
        "subprocess.run(cmd, shell=True)",
        "np.load(path, allow_pickle=True)",
        "try:\n    f()\nexcept Exception:\n    pass",
        "try:\n    f()\nexcept:\n    x = 1",
    ],
)
def test_the_check_above_finds_what_it_looks_for(source):
    assert list(banned_calls(ast.parse(source)))


def test_environment_variables_are_those_of_the_table():
    documented = set(
        re.findall(r"^\| `(WARPLOOM_\w+)` \|", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), re.M)
    )
    used = set()
    for path in [*MODULES, *SOURCES, ROOT / "setup.py"]:
        text = path.read_text(encoding="utf-8")
        used |= set(re.findall(r"(?:environ\.get\(|environ\[|getenv\()\s*[\"'](\w+)[\"']", text))
    build = {"CXX", "CXXFLAGS", "LDFLAGS"}  # every compiler's, setup.py alone
    torchrun = {
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "GROUP_WORLD_SIZE",
        "TORCHELASTIC_RUN_ID",
        "TORCHELASTIC_RESTART_COUNT",
    }
    of_others = {"TRITON_INTERPRET", "XDG_CACHE_HOME", *torchrun}
    assert used - build - of_others == documented


def test_importing_starts_no_thread_and_opens_no_file():
    """Files of the package itself and of the libraries it imports are what an import reads; nothing is left open, and
    no thread runs that was not there before."""
    script = f"""
import os, sys, threading, importlib
import torch, numpy, tensorboardX, rich, tyro, tokenizers, safetensors, jinja2, psutil, zstandard, xxhash
def state():
    files = {{os.readlink(f"/proc/self/fd/{{fd}}") for fd in os.listdir("/proc/self/fd")
             if os.path.exists(f"/proc/self/fd/{{fd}}")}}
    return len(os.listdir("/proc/self/task")), threading.active_count(), files - {{"/proc/{{}}/fd".format(os.getpid())}}
before = state()
for name in {[module_name(path) for path in MODULES]!r}:
    # These import triton, which only their first use may load, and torch.distributed's parts, which do so themselves.
    if not name.startswith(("warploom_kernels.", "warploom.parallel.")) or name == "warploom.parallel.config":
        importlib.import_module(name)
assert state() == before, (before, state())
assert "triton" not in sys.modules
assert not torch.cuda.is_initialized()
print("imported")
"""
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to look at a process's threads and files")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(package.parent) for package in PACKAGES)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "imported" in done.stdout, done.stderr


def test_the_ops_and_their_measurements_need_torch_alone():
    """Whoever takes the kernels has not installed what a trainer reads and writes files with."""
    declared = re.findall(r'^  "([\w-]+)[^"]*",', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    absent = {name.lower() for name in declared} - {"warploom", "torch", "numpy", "triton", "setuptools", "jinja2"}
    assert {"zstandard", "tyro", "tensorboardx", "rich", "xxhash"} <= absent  # jinja2: torch's own
    script = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0].lower() in {absent!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import warploom, warploom.optim, bench.gpu, bench.gpu_checks, bench.plain_torch
model = warploom.Transformer(warploom.preset("nano"))
try:
    warploom.Trainer
except ModuleNotFoundError:
    print("only the trainer needs more")
"""
    paths = [ROOT, *(package.parent for package in PACKAGES)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout == "only the trainer needs more\n", done.stdout + done.stderr


def test_every_public_name_is_there():
    import warploom

    assert set(warploom.__all__) <= set(dir(warploom))
    for name in warploom.__all__:
        assert callable(getattr(warploom, name))
    with pytest.raises(AttributeError, match="no attribute 'Trainers'"):
        _ = warploom.Trainers
