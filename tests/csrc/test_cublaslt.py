"""What csrc/cuda/cublaslt.cpp declares of cuBLASLt, against the library's own header; how the library is looked for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from warploom.cli.doctor import extension_rows
from warploom.ops import _cublaslt, _extension
from warploom.ops.linear import OP

ROOT = Path(__file__).resolve().parents[2]
# Our name, the header's, and its number in cublasLt.h and cublas_api.h of the PyPI package nvidia-cublas 13.1.0.3 and
# in CUDA's library_types.h.
HEADER = {
    "Epilogue": [
        ("kNone", "CUBLASLT_EPILOGUE_DEFAULT", 1),
        ("kRelu", "CUBLASLT_EPILOGUE_RELU", 2),
        ("kBias", "CUBLASLT_EPILOGUE_BIAS", 4),
        ("kReluBias", "CUBLASLT_EPILOGUE_RELU_BIAS", 6),
        ("kReluMask", "CUBLASLT_EPILOGUE_RELU_AUX", 130),
        ("kReluMaskBias", "CUBLASLT_EPILOGUE_RELU_AUX_BIAS", 134),
        ("kSumOfB", "CUBLASLT_EPILOGUE_BGRADB", 512),
    ],
    "MatmulDescAttribute": [
        ("kTransA", "CUBLASLT_MATMUL_DESC_TRANSA", 3),
        ("kTransB", "CUBLASLT_MATMUL_DESC_TRANSB", 4),
        ("kEpilogue", "CUBLASLT_MATMUL_DESC_EPILOGUE", 7),
        ("kBiasPointer", "CUBLASLT_MATMUL_DESC_BIAS_POINTER", 8),
        ("kMaskPointer", "CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER", 11),
        ("kMaskLeadingDimension", "CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD", 12),
    ],
    "PreferenceAttribute": [
        ("kMaxWorkspaceBytes", "CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES", 1),
        ("kReductionSchemes", "CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK", 3),
        ("kAlignmentA", "CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES", 5),
        ("kAlignmentB", "CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES", 6),
        ("kAlignmentC", "CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES", 7),
        ("kAlignmentD", "CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES", 8),
    ],
    "ReductionScheme": [
        ("kInComputeType", "CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE", 2),
    ],
    "Status": [
        ("kSuccess", "CUBLAS_STATUS_SUCCESS", 0),
        ("kNotSupported", "CUBLAS_STATUS_NOT_SUPPORTED", 15),
    ],
    "ComputeType": [
        ("kComputeFloat", "CUBLAS_COMPUTE_32F", 68),
    ],
    "Operation": [
        ("kAsItIs", "CUBLAS_OP_N", 0),
        ("kTransposed", "CUBLAS_OP_T", 1),
    ],
    "Type": [
        ("kFloat", "CUDA_R_32F", 0),
        ("kHalf", "CUDA_R_16F", 2),
        ("kBFloat16", "CUDA_R_16BF", 14),
    ],
}


@pytest.mark.parametrize("enum", HEADER)
def test_numbers_are_those_of_the_header(enum):
    text = "".join(
        (ROOT / "csrc" / "cuda" / name).read_text(encoding="utf-8") for name in ("cublaslt.h", "cublaslt.cpp")
    )
    (body,) = re.findall(rf"^enum (?:class )?{enum} : \w+ {{(.*?)}};", text, re.DOTALL | re.MULTILINE)
    declared = {name: int(value) for name, value in re.findall(r"(\w+) = (\d+)", body)}
    assert declared == {ours: number for ours, _, number in HEADER[enum]}


def test_where_it_is_looked_for(tmp_path, monkeypatch):
    for package in ("cublas", "cu13"):
        (tmp_path / "nvidia" / package / "lib").mkdir(parents=True)
    (tmp_path / "nvidia" / "cublas" / "lib" / "libcublasLt.so.12").touch()
    (tmp_path / "nvidia" / "cu13" / "lib" / "libcublasLt.so.13").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    in_12 = ["libcublasLt.so.12", str(tmp_path / "nvidia/cublas/lib/libcublasLt.so.12")]
    in_13 = ["libcublasLt.so.13", str(tmp_path / "nvidia/cu13/lib/libcublasLt.so.13")]
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert list(_cublaslt._candidates()) == in_12 + in_13
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert list(_cublaslt._candidates()) == in_13 + in_12


@pytest.mark.skipif(not hasattr(torch.ops.warploom_cuda, "cublaslt_load"), reason="the extension has no CUDA part")
def test_without_the_library_it_is_not_offered_and_doctor_says_so(monkeypatch):
    monkeypatch.setattr(_extension, "why_cuda_missing", lambda *names: None)  # as on a machine with a GPU
    monkeypatch.setattr(_cublaslt, "_candidates", lambda: iter(["libcublasLt.so.99"]))
    _cublaslt._load.cache_clear()
    try:
        said = OP.refusal("cublaslt", "cuda")
        assert said is not None and said.startswith("cuBLASLt was not found: libcublasLt.so.99: cannot open")
        assert dict(extension_rows())["cuBLASLt"] == said
    finally:
        _cublaslt._load.cache_clear()
