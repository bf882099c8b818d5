"""What the build says of the CUDA part: architectures, and ptxas' report of every kernel's registers and spills."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from warploom.ops import REGISTRY, _extension

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")


@pytest.fixture
def setup():
    spec = importlib.util.spec_from_file_location("warploom_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(_extension.cuda_not_built() is not None, reason=str(_extension.cuda_not_built()))
class TestBuilt:
    def test_no_kernel_spills(self):
        cuda = _extension.build_record()["cuda"]
        assert {kernel["arch"] for kernel in cuda["kernels"]} == set(cuda["archs"])
        spilling = [kernel for kernel in cuda["kernels"] if kernel["spill_bytes"] or kernel["stack_bytes"]]
        assert not spilling

    def test_every_op_has_kernels_for_every_architecture(self):
        cuda = _extension.build_record()["cuda"]
        for arch in cuda["archs"]:
            names = " ".join(kernel["kernel"] for kernel in cuda["kernels"] if kernel["arch"] == arch)
            for op in (name for name, op in REGISTRY.items() if "cuda" in op.backends):
                assert f"{op}_" in names, f"{op}, sm_{arch}"

    def test_operators_are_registered_and_refuse_tensors_of_the_cpu(self):
        import torch

        if _extension.missing is not None:
            pytest.skip(_extension.missing)
        x = torch.ones(2, 8)
        with pytest.raises(ValueError, match="expected a tensor on a GPU, got one on cpu"):
            torch.ops.warploom_cuda.layer_norm_fwd(x, x[0], None, None, 1e-5)


SPILLING = """
__global__ void __launch_bounds__(1024, 2) spilling_kernel(float* x) {
  float held[100];
#pragma unroll
  for (int i = 0; i < 100; ++i) held[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 100; ++i) x[(i * 1024 + threadIdx.x) * 2] = held[99 - i] * held[i];
}
"""


@pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")
def test_a_spill_is_read_from_the_report(setup, tmp_path):
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    command = [NVCC, "--resource-usage", "-gencode", "arch=compute_80,code=sm_80", "-c", source, "-o", tmp_path / "o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (kernel,) = setup.read_resources(done.stdout + done.stderr)
    assert "spilling_kernel" in kernel["kernel"] and kernel["arch"] == "80"
    assert kernel["spill_bytes"] > 0 and 0 < kernel["registers"] <= 32


@pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")
def test_a_warning_of_nvcc_is_an_error(setup, tmp_path):
    source = tmp_path / "warned.cu"
    source.write_text("__global__ void kernel(int* x) { int unused = 1; *x = 2; }\n")
    command = f"{NVCC} {setup.CUDA_FLAGS} -gencode arch=compute_80,code=sm_80 -c {source} -o {tmp_path / 'o'}"
    done = subprocess.run(command.split(), capture_output=True, text=True)
    assert done.returncode != 0 and "never referenced" in done.stdout + done.stderr


def test_architectures_are_asked_for_by_name(setup, monkeypatch):
    monkeypatch.setenv("WARPLOOM_CUDA_ARCHS", "none")
    with pytest.raises(setup.CannotBuild, match="WARPLOOM_CUDA_ARCHS=none was set"):
        setup.find_cuda("c++")
    monkeypatch.setenv("WARPLOOM_CUDA_ARCHS", "80, 75")
    with pytest.raises(SystemExit, match="must be none or some of 80 86 89 90a 100 120, got 75"):
        setup.find_cuda("c++")
    monkeypatch.delenv("WARPLOOM_CUDA_ARCHS")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(setup, "CUDA_FOLDERS", ("/nowhere",))
    with pytest.raises(setup.CannotBuild, match="no nvcc found"):
        setup.find_cuda("c++")


@pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")
def test_what_the_toolkit_knows_is_built(setup, monkeypatch):
    monkeypatch.setenv("WARPLOOM_CUDA_ARCHS", "90a,80")
    nvcc, link_flags, version, archs = setup.find_cuda("c++")
    assert nvcc == NVCC and "-lcudart_static" in link_flags and version[0].isdigit() and archs == ["80", "90a"]
    with pytest.raises(setup.CannotBuild, match="does not work with /bin/false"):
        setup.find_cuda("/bin/false")


@pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")
def test_a_torch_that_names_no_streams_gets_no_cuda_part(setup, monkeypatch, tmp_path):
    from torch.utils import cpp_extension

    assert setup.torch_names_streams()
    (tmp_path / "c10" / "core").mkdir(parents=True)
    (tmp_path / "c10" / "core" / "Stream.h").write_text("class Stream {};\n")
    monkeypatch.setattr(cpp_extension, "include_paths", lambda: [str(tmp_path)])
    with pytest.raises(setup.CannotBuild, match="no c10::Stream::native_handle"):
        setup.find_cuda("c++")


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["80"], (8, 0), True),
        (["80"], (8, 9), True),
        (["86"], (8, 0), False),
        (["80"], (9, 0), True),  # by its PTX
        (["90a"], (9, 0), True),
        (["90a"], (10, 0), False),
        (["80", "90a"], (10, 0), False),
        (["80", "90a", "100"], (12, 0), True),
        (["100"], (10, 3), True),
    ],
)
def test_what_a_build_runs_on(archs, capability, runs):
    assert _extension._runs_on(archs, *capability) is runs


def test_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(_extension, "missing", None)
    record = {"cuda": {"reason": "no nvcc found", "archs": [], "nvcc": None, "kernels": []}}
    monkeypatch.setattr(_extension, "build_record", lambda: record)
    assert _extension.why_cuda_missing("layer_norm_fwd") == "the CUDA kernels were not built: no nvcc found"
