"""The numbers of every Triton kernel, without a GPU: the contract tests under Triton's interpreter.

float32 and float16 only where a kernel multiplies matrices: the interpreter's tl.dot multiplies the raw bits of
bfloat16 (seen with Triton 3.6.0, 3.7.1 and 3.9.0), and ops/_triton.py refuses it there.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from warploom.ops import REGISTRY

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

CONTRACT = Path(__file__).parents[1] / "ops" / "test_contract.py"
OPS = sorted(name for name, op in REGISTRY.items() if "triton" in op.backends)
SWEEP = "accuracy or layouts or alone or expanded or fake or deterministic or writes"
# What runs each time, of the accuracy tests: cases that between them take every branch of the kernels.
QUICK = {
    "attention": "(float32 and (tiny or no_ or rows_that or wide_160)) or (-float16 and (packed_cross_bias or decode))",
    "adamw": "first_step or amsgrad or clipped or (float32 and several_blocks)",
    "cross_entropy": "float32 and (tiny or all_ignored or 33x257 or in_place)",
    "embedding": "float32",
    "grad_norm": "ragged or nothing or large",
    "layer_norm": "float16",
    "linear": "float32 and (tiny or one_row or no_ or 7x63 or 33x128)",
    "linear_cross_entropy": "float32 and (tiny or one_class or all_ignored or batched)",
    "linear_glu": "float32 and (tiny or one_row or no_ or ragged)",
    "linear_qkv": "float32 and (tiny or one_row or grouped or no_)",
    "newton_schulz": "float32",
    "rms_norm": "float16",
    "rotary": "float32",
}


def run_contract(wanted):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(CONTRACT), "-q", "-p", "no:cacheprovider", "-k", wanted, "-W", "default"],
        cwd=CONTRACT.parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    refused = set(re.findall(r"SKIPPED \[\d+\] [^:]+:\d+: (.*)", done.stdout))
    return int(passed), refused


def test_quick_cases():
    """One process for all ops: collecting the tests is most of a quick run."""
    wanted = " or ".join(f"([{op}-triton and accuracy and ({QUICK[op]}))" for op in OPS)
    wanted += " or (attention-triton-tiny_packed and layouts)"  # offsets that do not lie side by side
    passed, refused = run_contract(wanted)
    assert passed >= 5 * len(OPS)
    assert not refused


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("op", OPS)
def test_whole_sweep(op):
    passed, refused = run_contract(f"[{op}-triton and ({SWEEP})")
    assert passed >= 5 * len(REGISTRY[op].cases)
    assert all("bfloat16" in reason for reason in refused), refused


def test_a_wrong_kernel_is_caught():
    """The sweep is worth what it finds: with the mean left out of a row's centring nothing passes."""
    code = """
import torch
from warploom.ops import REGISTRY
from warploom.ops._accuracy import Trial
from warploom.ops._proof import Refuted, check_accuracy
from warploom_kernels import _norm_rows
right = _norm_rows.launch_norm_fwd
def wrong(x, weight, bias, residual, eps, *, centred):
    return right(x + 1e-3, weight, bias, residual, eps, centred=centred)
import warploom_kernels.layer_norm as module
op = REGISTRY["layer_norm"]
trial = Trial(op, op.cases[0], torch.float32)
check_accuracy(op, "triton", trial)
module.launch_norm_fwd = wrong
try:
    check_accuracy(op, "triton", trial)
except Refuted as refuted:
    print("caught:", refuted)
"""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "caught: output 1" in done.stdout, done.stdout + done.stderr


def run_code(code):
    """What a program with the interpreter on prints."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_relu_masks_are_those_of_the_reference():
    said = run_code("""
import torch
from warploom.ops import backend
x, weight = torch.randn(37, 40), torch.randn(300, 40)
masks = []
for name in ("reference", "triton"):
    with backend(name):
        masks.append(torch.ops.warploom.linear_fwd(x, weight, None, None, "relu", True)[1][:, :300 // 8])
print("equal" if torch.equal(*masks) and masks[0].any() else masks)
""")
    assert said == "equal\n"


def test_adamw_writes_the_copies_of_the_new_weights():
    """Cut or rounded to bfloat16: the interpreter of Triton 3.7.1 cuts where GPUs round."""
    said = run_code("""
import torch
from warploom.ops import adamw, backend
params = [torch.randn(70, 90), torch.randn(5), torch.randn(4100)]
copies = [torch.zeros(70, 90, dtype=torch.bfloat16), torch.empty(0, dtype=torch.uint8), torch.zeros(4100).bfloat16()]
lists = [[torch.rand_like(p) for p in params] for _ in range(3)]
before = [p.clone() for p in params]
with backend(adamw="triton"):
    adamw(params, *lists, [], [torch.ones(()) for _ in params], packed=copies,
          lr=0.1, beta1=0.9, beta2=0.95, weight_decay=0.1, eps=1e-8)
def cut(p):
    return (p.view(torch.int32) & -65536).view(torch.float32).bfloat16()
print([(torch.equal(c, p.bfloat16()) or torch.equal(c, cut(p))) and not torch.equal(p, b)
       for c, p, b in zip(copies, params, before) if c.numel()])
""")
    assert said == "[True, True]\n"


def test_the_gradient_of_an_embedding_is_added_to_another():
    said = run_code("""
import torch
from warploom.ops import backend
tokens, dy, start = torch.randint(9, (60,)), torch.randn(60, 40), torch.randn(9, 40)
sums = []
for name in ("reference", "triton"):
    sums.append(start.clone())
    with backend(name):
        torch.ops.warploom.embedding_bwd_into(dy, tokens, sums[-1])
torch.testing.assert_close(*sums)
print("equal")
""")
    assert said == "equal\n"


def test_bfloat16_products_are_refused_in_words():
    code = """
import torch
from warploom.ops import attention, backend
q = torch.randn(1, 1, 16, 16, dtype=torch.bfloat16)
try:
    with backend("triton"):
        attention(q, q, q)
except RuntimeError as error:
    print(error)
"""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "raw bits of bfloat16" in done.stdout


def test_without_gpu_or_interpreter_it_says_why():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert OPS
    for name in OPS:
        assert "no NVIDIA GPU" in REGISTRY[name].refusal("triton", "cuda")


def test_importing_the_ops_does_not_import_triton():
    code = "import sys, torch; before = set(sys.modules); import warploom.ops; print(*set(sys.modules) - before)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "warploom.ops.rms_norm" in done.stdout.split()
    assert not [name for name in done.stdout.split() if name.partition(".")[0] in ("triton", "warploom_kernels")]
