"""The nearest orthogonal matrix by Newton-Schulz iterations, roughly: how Muon (Jordan et al., 2024) shapes an update.

Matrices of one shape go through the iteration as a batch, in a dtype of the caller's choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from warploom.ops import _triton
from warploom.ops._op import Backend, BadCase, BenchCase, Case, Op

# Jordan's quintic: steepest at 0, so that five steps bring singular values from 1e-3 up into about 0.7 to 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5


@torch.no_grad()
def newton_schulz(matrices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Bring the singular values of each matrix near 1 by five iterations x = a x + (b g + c g g) x with g = x x^T.

    matrices: (..., M, N), floating, returned in the same shape and dtype. Products run in dtype, the matrices' own if
    None. A matrix of zeros stays zero. Raises ValueError for fewer than two dimensions, TypeError for a wrong dtype.
    """
    dtype = matrices.dtype if dtype is None else dtype
    if not matrices.is_floating_point() or not dtype.is_floating_point:
        raise TypeError(f"matrices and dtype must be floating point, got {matrices.dtype} and {dtype}")
    if matrices.dim() < 2:
        raise ValueError(f"matrices must be (..., M, N), got {tuple(matrices.shape)}")
    return torch.ops.warploom.newton_schulz_fwd.default(matrices, dtype, list(COEFFICIENTS), NUM_ITERATIONS)


def newton_schulz_reference(matrices, dtype=None):
    return _reference_fwd(matrices, matrices.dtype if dtype is None else dtype, COEFFICIENTS, NUM_ITERATIONS)


def _reference_fwd(matrices, dtype, coefficients, iterations):
    a, b, c = coefficients
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT  # (..., short, long): the smaller Gram matrix
    # The Frobenius norm bounds the largest singular value, which the iteration needs to be at most 1.
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    # An operator's outputs must not share memory, and have the layout that the fake implementation names.
    return (x if wide else x.mT).to(matrices.dtype, copy=True, memory_format=torch.contiguous_format)


def _fake_fwd(matrices, dtype, coefficients, iterations):
    return torch.empty_like(matrices, memory_format=torch.contiguous_format)


def _case(*shape, scale=1.0):
    return lambda generator: {"matrices": scale * torch.randn(shape, generator=generator, dtype=torch.float64)}


def _bench(K, M, N):
    short, long = min(M, N), max(M, N)
    return BenchCase(
        f"{K}x{M}x{N}",
        _case(K, M, N),
        flops=NUM_ITERATIONS * K * (4 * short * short * long + 2 * short**3),
        bytes_per_element=2 * K * M * N,
    )


OP = Op(
    name="newton_schulz",
    function=newton_schulz,
    reference=newton_schulz_reference,
    torch_peer=newton_schulz_reference,
    schemas={"fwd": "(Tensor matrices, ScalarType dtype, float[] coefficients, int iterations) -> Tensor"},
    fakes={"fwd": _fake_fwd},
    backends={
        "reference": Backend(kernels={"fwd": _reference_fwd}, devices=("cpu", "cuda")),
        "triton": Backend(
            kernels={"fwd": _triton.launcher("newton_schulz", "launch_newton_schulz_fwd")},
            devices=("cuda", "cpu"),
            missing=_triton.missing,
            refuses={
                "fwd": lambda matrices, dtype, *_: (
                    _triton.refuses_tensor(matrices) or _triton.refuses_product(matrices.new_empty(0, dtype=dtype))
                )
            },
            slower={
                "fwd": lambda matrices, dtype, *_: "cuBLAS is faster in float32" if dtype == torch.float32 else None
            },
        ),
    },
    cases=tuple(
        Case(name, make, dtypes=(torch.float32, torch.bfloat16), no_grad=("matrices",))
        for name, make in {
            "one": _case(3, 5),
            "zeros": _case(2, 4, 4, scale=0.0),
            "wide": _case(2, 33, 70),
            "tall": _case(3, 70, 40),
            "square": _case(2, 2, 64, 64),
            "large_values": _case(2, 20, 30, scale=1e12),
        }.items()
    ),
    bad_cases=(
        BadCase("vector", lambda: {"matrices": torch.ones(3)}, ValueError, r"matrices must be \(..., M, N\)"),
        BadCase("integers", lambda: {"matrices": torch.ones(3, 3, dtype=torch.int64)}, TypeError, "must be floating"),
    ),
    bench_cases=(_bench(24, 384, 384), _bench(6, 1536, 384)),
    differentiable=False,
)
