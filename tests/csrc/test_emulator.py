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
# The same of the back end cublaslt, on a library of our own that computes what NVIDIA's is documented to.
CUBLASLT = "no_rows|200x72x136|of_eights|batched"


@dataclass(frozen=True)
class Planted:
    """A bug: `old`, which stands once in the file, replaced by `new`; the case of the op that must show it, and how."""

    op: str
    file: str
    old: str
    new: str
    cases: str
    found: str
    by_cublaslt: bool = False


PLANTED = {
    "copy of something else": Planted(
        "adamw", "adamw.cu", "copy.set(i, p);", "copy.set(i, m);", "ragged", "the copy of tensor 0"
    ),
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
    "vectors from any address on": Planted(
        "adamw",
        "vector.cuh",
        "reinterpret_cast<uintptr_t>(pointers) % bytes == 0",
        "reinterpret_cast<uintptr_t>(pointers) != 1",
        "ragged",
        "at no multiple of",
    ),
    "grid that is too tall": Planted(
        "layer_norm",
        "layer_norm.cu",
        "dim3(blocks), block, 2",
        "dim3(1, blocks + 65535), block, 2",
        "many_rows",
        "a grid of 1 x 65",
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
    "mask that is shifted": Planted(
        "linear", "linear.cu", "bits >> (2 * i + 1)", "bits >> (2 * i + 2)", "of_eights", "max error", by_cublaslt=True
    ),
    "matrix that is not transposed": Planted(
        "linear",
        "cublaslt.cpp",
        "set(kTransB, p.transpose_b ?",
        "set(kTransB, !p.transpose_b ?",
        "of_eights",
        "unsupported value",
        by_cublaslt=True,
    ),
    "mask's rows in bytes": Planted(
        "linear",
        "cublaslt.cpp",
        "set(kMaskLeadingDimension, p.mask_bits)",
        "set(kMaskLeadingDimension, p.mask_bits / 8)",
        "of_eights",
        "unsupported value",
        by_cublaslt=True,
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
    if not bug.file.endswith(".cuh"):
        return text
    source = (folder / f"{bug.op}.cu").read_text(encoding="utf-8")
    return source.replace(f'#include "cuda/{bug.file}"\n', text.replace("#pragma once\n", ""))


@pytest.fixture(scope="module")
def cublaslt_log(tmp_path_factory):
    return tmp_path_factory.mktemp("cublaslt") / "products.jsonl"


@pytest.fixture(scope="module")
def quick_results(cublaslt_log):
    """By op and by planted bug. All in one process: importing torch under AddressSanitizer is most of a short run."""
    jobs = {op: {"library": str(build.build()), "op": op, "cases": QUICK[op], "seed": 1} for op in OPS}
    by_cublaslt = {"op": "linear", "cublaslt": str(build.build_cublaslt()), "seed": 1}
    logged = {"FAKE_CUBLASLT_LOG": str(cublaslt_log)}
    jobs["cublaslt"] = {**jobs["linear"], **by_cublaslt, "cases": CUBLASLT, "environment": logged}
    lacks = {"FAKE_CUBLASLT_LACKS": "136"}  # and so the forward of this case
    jobs["cublaslt lacks"] = {**jobs["linear"], **by_cublaslt, "cases": "200x72x136", "environment": lacks}
    for name, bug in {**PLANTED, "without swizzle": WITHOUT_SWIZZLE}.items():
        library = build.build({f"{bug.op}.cu" if bug.file.endswith(".cuh") else bug.file: text_with(bug)})
        jobs[name] = {"library": str(library), "op": bug.op, "cases": bug.cases, "seed": 1}
        if bug.by_cublaslt:
            jobs[name].update(by_cublaslt)
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


def test_linear_by_cublaslt(quick_results, cublaslt_log):
    assert_proven(quick_results["cublaslt"], "linear")
    products = [json.loads(line) for line in cublaslt_log.read_text().splitlines()]
    relu, bias, bits, sums = 2, 4, 128, 512
    assert {each["epilogue"] for each in products} >= {1, bias, relu | bits, relu | bits | bias, sums}
    for each in products:
        if each["epilogue"] & bits:
            assert each["transpose_a"] and not each["transpose_b"]  # weight x^T
            assert each["aux_ld"] == -(-each["m"] // 128) * 128
    # A ragged row of bits, and float gradients of a float weight.
    assert {128, 256} <= {each["aux_ld"] for each in products}
    assert any(each["epilogue"] == sums and each["d_type"] == 0 for each in products)


def test_what_cublaslt_has_no_kernel_for_is_refused(quick_results):
    """Forced, it is an error; otherwise the next back end takes the call."""
    proof = quick_results["cublaslt lacks"]["proof"]
    assert proof["proven"] == 0 and proof["refused"] > 0 and proof["failures"] == []


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
