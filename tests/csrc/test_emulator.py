"""The CUDA C++ kernels without a GPU: their sources run on the CPU, in the emulator under tests/csrc/emulator.

Each op's cases are held to float64 there as on every other back end, with new memory poisoned and threads scheduled at
random, and any access outside of allocated memory, race or hang ends the run. Planted bugs show that it does.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from warploom.ops import REGISTRY

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def _load_build():
    spec = importlib.util.spec_from_file_location("emulator_build", HERE / "emulator" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _load_build()
pytestmark = [
    pytest.mark.skipif(build.missing() is not None, reason=str(build.missing())),
    pytest.mark.timeout(1800),  # the first test of the module compiles
]

OPS = sorted(name for name, op in REGISTRY.items() if "cuda" in op.backends)
# What runs each time: cases that between them take every branch of the kernels.
QUICK = {
    "adamw": "ragged|several_blocks|amsgrad|clipped",
    "attention": "nothing_seen_64|wide_96",
    "layer_norm": "tiny|no_rows|width_65|width_1000|many_rows",
    "linear": "no_rows|200x72x136|of_eights",
}


@dataclass(frozen=True)
class Planted:
    """A bug: `old`, which stands once in the file, replaced by `new`; the case of the op that must show it, and how."""

    op: str
    file: str
    old: str
    new: str
    cases: str
    found: str


PLANTED = {
    "missing barrier": Planted(
        "layer_norm",
        "layer_norm.cu",
        "between[threadIdx.x / ptx::kWarp] = value;\n  ptx::block_barrier();",
        "between[threadIdx.x / ptx::kWarp] = value;",
        "width_1000",
        "race: thread",
    ),
    "lane that does not come": Planted(
        "layer_norm",
        "layer_norm.cu",
        "if (row >= a.N) return;",
        "if (row >= a.N || threadIdx.x == 5) return;",
        "many_rows",
        "waits for ever at shuffle_xor",
    ),
    "too little shared memory": Planted(
        "layer_norm",
        "layer_norm.cu",
        "block, 2 * kMaxWarps * sizeof(Pair), stream, a);\n}",
        "block, (kMaxWarps + 1) * sizeof(Pair), stream, a);\n}",
        "width_1000",
        "heap-buffer-overflow",
    ),
    "past the end of a row": Planted(
        "layer_norm",
        "vector.cuh",
        "if (i < count) elements[i] = pointer[i];",
        "elements[i] = pointer[i];",
        "width_7$",
        "AddressSanitizer: heap-",
    ),
    "wrong fragment index": Planted(
        "linear",
        "tiles.cuh",
        "tile.chunk(row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8)",
        "tile.chunk(row + lane % 8 + lane / 8 % 2 * 8, column + lane / 16 * 8)",
        "of_eights",
        "output 0: max error",
    ),
    "copy that is not waited for": Planted(
        "linear",
        "linear.cu",
        "    ptx::wait_copies<0>();\n    //",
        "    //",
        "of_eights",
        "a copy into it is on its way",
    ),
    "wrong sum": Planted(
        "layer_norm", "layer_norm.cu", "mask > 0; mask /= 2", "mask > 1; mask /= 2", "width_65", "output 0: max error"
    ),
}


# No bug, but slow: every row of a tile in the same banks.
WITHOUT_SWIZZLE = Planted(
    "linear", "tiles.cuh", "((column / kChunk) ^ (row % 8)) * 16", "(column / kChunk) * 16", "of_eights", ""
)


def run(jobs: list[dict]) -> list[dict]:
    done = subprocess.run(
        [sys.executable, HERE / "check_emulated.py"],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**build.environment(), "PYTHONPATH": f"{ROOT / 'engine'}:{ROOT / 'kernels'}"},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def text_with(bug: Planted) -> str:
    """The op's source, a header in which the bug is put in its place."""
    folder = ROOT / "csrc" / "cuda"
    text = (folder / bug.file).read_text(encoding="utf-8")
    assert text.count(bug.old) == 1, f"{bug.file} has changed"
    text = text.replace(bug.old, bug.new)
    if bug.file.endswith(".cu"):
        return text
    source = (folder / f"{bug.op}.cu").read_text(encoding="utf-8")
    return source.replace(f'#include "cuda/{bug.file}"\n', text.replace("#pragma once\n", ""))


@pytest.fixture(scope="module")
def quick_results():
    """By op and by planted bug. All in one process: importing torch under AddressSanitizer is most of a short run."""
    jobs = {op: {"library": str(build.build()), "op": op, "cases": QUICK[op], "seed": 1} for op in OPS}
    for name, bug in {**PLANTED, "without swizzle": WITHOUT_SWIZZLE}.items():
        library = build.build({f"{bug.op}.cu": text_with(bug)})
        jobs[name] = {"library": str(library), "op": bug.op, "cases": bug.cases, "seed": 1}
    return dict(zip(jobs, run(list(jobs.values())), strict=True))


def assert_proven(result, op):
    assert "error" not in result, result["error"]
    proof = result["proof"]
    assert proof["failures"] == []
    assert proof["proven"] > 0
    assert proof["bank_conflicts"] == 0


@pytest.mark.parametrize("op", OPS)
def test_op(quick_results, op):
    assert_proven(quick_results[op], op)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_found(quick_results, name):
    assert PLANTED[name].found in json.dumps(quick_results[name])


def test_bank_conflicts_are_counted(quick_results):
    proof = quick_results["without swizzle"]["proof"]
    assert proof["bank_conflicts"] > 0 and proof["failures"] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("op", OPS)
def test_every_case(op, seed):
    (result,) = run([{"library": str(build.build()), "op": op, "cases": "", "seed": seed}])
    assert_proven(result, op)
