"""Triton kernels without a GPU: numbers under Triton's interpreter, machine code from its compiler."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

CONTRACT = Path(__file__).parents[1] / "ops" / "test_contract.py"

HALF, FLOAT = "*fp16", "*fp32"
# Kernel -> types of its arguments (None: an optional tensor that is absent), with C and the block for each.
VARIANTS = {
    "rms_norm_fwd_kernel": [
        {"x": HALF, "residual": HALF, "weight": HALF, "y": HALF, "stream": HALF, "rstd": FLOAT},
        {"x": FLOAT, "residual": None, "weight": FLOAT, "y": FLOAT, "stream": None, "rstd": FLOAT},
    ],
    "rms_norm_bwd_kernel": [
        {"dy": HALF, "dstream": HALF, "x": HALF, "weight": HALF, "rstd": FLOAT, "dx": HALF, "dweight_parts": FLOAT},
        {"dy": FLOAT, "dstream": None, "x": FLOAT, "weight": FLOAT, "rstd": FLOAT, "dx": FLOAT, "dweight_parts": FLOAT},
    ],
}


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    ("kernel", "types"),
    [(kernel, types) for kernel, variants in VARIANTS.items() for types in variants],
    ids=lambda value: value if isinstance(value, str) else ("plain" if None in value.values() else "residual"),
)
def test_rms_norm_compiles(kernel, types, architecture):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from warploom_kernels import rms_norm

    signature, constants = {}, {"BLOCK_C": 1024}
    for name in getattr(rms_norm, kernel).arg_names:
        if name == "BLOCK_C" or (name in types and types[name] is None):
            signature[name] = "constexpr"
            constants.setdefault(name, None)
        else:
            signature[name] = types.get(name, "fp32" if name == "eps" else "i32")
    source = ASTSource(getattr(rms_norm, kernel), signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 4})
    assert compiled.asm["cubin"].startswith(b"\x7fELF")
    assert f"sm_{architecture}" in compiled.asm["ptx"]


def test_rms_norm_meets_the_contract_under_the_interpreter():
    """The tests of tests/ops/test_contract.py, with the triton back end made available by the interpreter."""
    wanted = "rms_norm-triton and (accuracy or layouts or alone or expanded or fake or deterministic or writes)"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(CONTRACT), "-q", "-p", "no:cacheprovider", "-k", wanted, "-W", "default"],
        cwd=CONTRACT.parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) > 50, done.stdout
    assert "skipped" not in done.stdout


def test_without_gpu_or_interpreter_it_says_why():
    import torch

    import warploom.ops

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    op = warploom.ops.REGISTRY["rms_norm"]
    assert "no NVIDIA GPU" in op.refusal("triton", "cuda")


def test_importing_the_ops_does_not_import_triton():
    code = "import sys, torch; before = set(sys.modules); import warploom.ops; print(*set(sys.modules) - before)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "warploom.ops.rms_norm" in done.stdout.split()
    assert not [name for name in done.stdout.split() if name.partition(".")[0] in ("triton", "warploom_kernels")]
