"""y = x * rstd * weight over the last dimension, rstd = 1 / sqrt(mean(x^2) + eps) (Zhang and Sennrich, 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from warploom.ops import _extension, _triton
from warploom.ops._op import Backend, BadCase, BenchCase, Case, Op


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Scale each row of x to unit root mean square, then by weight.

    x, residual: (..., C); weight: (C,); one floating dtype. Sums run in float32 (float64 for float64).
    Returns y, of x's shape and dtype. With a residual, x is first added to it, and (y, residual + x) is returned: the
    second is the new residual stream, rounded to x's dtype before it is normalised.
    Raises ValueError for a wrong shape, TypeError for a wrong or mixed dtype.
    """
    C = x.shape[-1] if x.dim() else 0
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if x.dim() == 0 or C == 0:
        raise ValueError(f"x must have a last dimension of at least 1, got shape {tuple(x.shape)}")
    for name, tensor, shape in (("weight", weight, (C,)), ("residual", residual, tuple(x.shape))):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape} to match x {tuple(x.shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} must be {x.dtype} as x is, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} as x is, got {tensor.device}")
    y, stream = _RMSNorm.apply(x, weight, residual, eps)
    return y if residual is None else (y, stream)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, residual, eps):
        y, stream, rstd = torch.ops.warploom.rms_norm_fwd(x, weight, residual, eps)
        ctx.save_for_backward(x if residual is None else stream, weight, rstd)
        ctx.has_residual = residual is not None
        return y, stream

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstream):
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = torch.ops.warploom.rms_norm_bwd(dy, dstream if ctx.has_residual else None, x, weight, rstd)
        return dx, dweight, dx if ctx.has_residual else None, None


def rms_norm_reference(x, weight, eps=1e-6, residual=None):
    stream = x if residual is None else x + residual
    wide = stream if stream.dtype == torch.float64 else stream.float()
    rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = (wide * rstd * weight.to(wide.dtype)).to(x.dtype)
    return y if residual is None else (y, stream)


def _torch_peer(x, weight, eps=1e-6, residual=None):
    stream = x if residual is None else x + residual
    y = F.rms_norm(stream, weight.shape, weight, eps)
    return y if residual is None else (y, stream)


def _reference_fwd(x, weight, residual, eps):
    stream = x if residual is None else x + residual
    wide = stream if stream.dtype == torch.float64 else stream.float()
    rstd = (wide.square().mean(-1) + eps).rsqrt()  # (...)
    y = wide * rstd[..., None] * weight.to(wide.dtype)
    return y.to(x.dtype), x.new_empty(0) if residual is None else stream, rstd


def _reference_bwd(dy, dstream, x, weight, rstd):
    wide = rstd.dtype
    x_hat = x.to(wide) * rstd[..., None]  # (..., C)
    dx_hat = dy.to(wide) * weight.to(wide)
    # y ignores the length of x, so the part of dx_hat along x_hat carries no gradient.
    dx = rstd[..., None] * (dx_hat - x_hat * (dx_hat * x_hat).mean(-1, keepdim=True))
    if dstream is not None:
        dx = dx + dstream.to(wide)
    dweight = (dy.to(wide) * x_hat).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype), dweight.to(weight.dtype)


def _fake_fwd(x, weight, residual, eps):
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(0) if residual is None else torch.empty_like(y), rstd


def _fake_bwd(dy, dstream, x, weight, rstd):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _case(*shape, residual=False, scale=1.0):
    def make(generator):
        def draw(*size):
            return torch.randn(size, generator=generator, dtype=torch.float64)

        inputs = {"x": scale * draw(*shape), "weight": 1 + 0.5 * draw(shape[-1])}
        if residual:
            inputs["residual"] = draw(*shape)
        return inputs

    return make


_SCHEMAS = {
    "fwd": "(Tensor x, Tensor weight, Tensor? residual, float eps) -> (Tensor, Tensor, Tensor)",
    "bwd": "(Tensor dy, Tensor? dstream, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
}

OP = Op(
    name="rms_norm",
    function=rms_norm,
    reference=rms_norm_reference,
    torch_peer=_torch_peer,
    schemas=_SCHEMAS,
    fakes={"fwd": _fake_fwd, "bwd": _fake_bwd},
    backends={
        "reference": Backend(kernels={"fwd": _reference_fwd, "bwd": _reference_bwd}, devices=("cpu", "cuda")),
        "cpu": Backend(
            kernels={s: _extension.cpu_kernel(f"rms_norm_{s}") for s in _SCHEMAS},
            devices=("cpu",),
            missing=lambda: _extension.why_missing("rms_norm_fwd", "rms_norm_bwd"),
        ),
        "triton": Backend(
            kernels={s: _triton.launcher("rms_norm", f"launch_rms_norm_{s}") for s in _SCHEMAS},
            devices=("cuda", "cpu"),
            missing=_triton.missing,
            refuses={
                "fwd": lambda x, *_: _triton.refuses_rows(x),
                "bwd": lambda dy, ds, x, *_: _triton.refuses_rows(x),
            },
        ),
    },
    cases=(
        Case("tiny", _case(2, 3, 8, residual=True), gradcheck=True),
        Case("tiny_plain", _case(3, 5), gradcheck=True),
        Case("one_element", _case(3, 1)),
        Case("no_rows", _case(0, 16, residual=True)),
        *(Case(f"width_{C}", _case(7, C, residual=True)) for C in (7, 63, 65, 257, 768, 1000)),
        Case("large", _case(5, 96, scale=1e4)),
        Case("small", _case(5, 96, scale=1e-4), dtypes=(torch.float32, torch.bfloat16)),
    ),
    bad_cases=(
        BadCase(
            "weight_shape",
            lambda: {"x": torch.ones(2, 4), "weight": torch.ones(3)},
            ValueError,
            r"weight must be \(4,\)",
        ),
        BadCase(
            "weight_dtype",
            lambda: {"x": torch.ones(2, 4), "weight": torch.ones(4).half()},
            TypeError,
            "weight must be torch.float32",
        ),
        BadCase(
            "integers",
            lambda: {"x": torch.ones(2, 4, dtype=torch.int64), "weight": torch.ones(4)},
            TypeError,
            "x must be floating",
        ),
        BadCase(
            "residual_shape",
            lambda: {"x": torch.ones(2, 4), "weight": torch.ones(4), "residual": torch.ones(4)},
            ValueError,
            "residual must be",
        ),
    ),
    bench_cases=tuple(
        BenchCase(
            f"{rows}x{C}",
            _case(rows, C, residual=True),
            bytes_per_element=4 * rows * C,  # x and residual in, y and the new stream out
            backward_bytes_per_element=4 * rows * C,  # dy, dstream, x in, dx out
        )
        for rows, C in ((4096, 384), (8192, 768))
    ),
)
