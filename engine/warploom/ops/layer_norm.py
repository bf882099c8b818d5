"""y = (x - mean) * rstd * weight + bias over the last dimension, rstd = 1 / sqrt(var + eps) (Ba et al., 2016)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from warploom.ops import _extension, _triton
from warploom.ops._op import Backend, BadCase, BenchCase, Case, Op


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise each row of x to zero mean and unit variance, then scale by weight and shift by bias.

    x, residual: (..., C); weight, bias: (C,); one floating dtype. Sums run in float32 (float64 for float64).
    Returns y, of x's shape and dtype. With a residual, x is first added to it, and (y, residual + x) is returned: the
    second is the new residual stream, rounded to x's dtype before it is normalised.
    Raises ValueError for a wrong shape, TypeError for a wrong or mixed dtype.
    """
    C = x.shape[-1] if x.dim() else 0
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if x.dim() == 0 or C == 0:
        raise ValueError(f"x must have a last dimension of at least 1, got shape {tuple(x.shape)}")
    for name, tensor, shape in (("weight", weight, (C,)), ("bias", bias, (C,)), ("residual", residual, tuple(x.shape))):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape} to match x {tuple(x.shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} must be {x.dtype} as x is, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} as x is, got {tensor.device}")
    y, stream = _LayerNorm.apply(x, weight, bias, residual, eps)
    return y if residual is None else (y, stream)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps):
        y, stream, mean, rstd = torch.ops.warploom.layer_norm_fwd(x, weight, bias, residual, eps)
        ctx.save_for_backward(x if residual is None else stream, weight, mean, rstd)
        ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
        return y, stream

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstream):
        x, weight, mean, rstd = ctx.saved_tensors
        dx, dweight, dbias = torch.ops.warploom.layer_norm_bwd(
            dy, dstream if ctx.has_residual else None, x, weight, mean, rstd
        )
        return dx, dweight, dbias if ctx.has_bias else None, dx if ctx.has_residual else None, None


def layer_norm_reference(x, weight, bias=None, eps=1e-5, residual=None):
    stream = x if residual is None else x + residual
    wide = stream if stream.dtype == torch.float64 else stream.float()
    mean = wide.mean(-1, keepdim=True)
    rstd = ((wide - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    y = (wide - mean) * rstd * weight.to(wide.dtype)
    if bias is not None:
        y = y + bias.to(wide.dtype)
    y = y.to(x.dtype)
    return y if residual is None else (y, stream)


def _torch_peer(x, weight, bias=None, eps=1e-5, residual=None):
    stream = x if residual is None else x + residual
    y = F.layer_norm(stream, weight.shape, weight, bias, eps)
    return y if residual is None else (y, stream)


def _reference_fwd(x, weight, bias, residual, eps):
    stream = x if residual is None else x + residual
    wide = stream if stream.dtype == torch.float64 else stream.float()
    mean = wide.mean(-1)  # (...)
    rstd = ((wide - mean[..., None]).square().mean(-1) + eps).rsqrt()
    y = (wide - mean[..., None]) * rstd[..., None] * weight.to(wide.dtype)
    if bias is not None:
        y = y + bias.to(wide.dtype)
    return y.to(x.dtype), x.new_empty(0) if residual is None else stream, mean, rstd


def _reference_bwd(dy, dstream, x, weight, mean, rstd):
    wide = rstd.dtype
    x_hat = (x.to(wide) - mean[..., None]) * rstd[..., None]  # (..., C)
    dx_hat = dy.to(wide) * weight.to(wide)
    # y ignores the mean and the length of x, so the parts of dx_hat along 1 and along x_hat carry no gradient.
    dx = rstd[..., None] * (dx_hat - dx_hat.mean(-1, keepdim=True) - x_hat * (dx_hat * x_hat).mean(-1, keepdim=True))
    if dstream is not None:
        dx = dx + dstream.to(wide)
    C = x.shape[-1]
    dweight = (dy.to(wide) * x_hat).reshape(-1, C).sum(0)
    dbias = dy.to(wide).reshape(-1, C).sum(0)
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype)


def _cuda_refuses(x: Tensor) -> str | None:
    widest = 8192 if x.dtype == torch.float32 else 12288
    if x.shape[-1] > widest:
        return f"its rows hold at most {widest} elements of {x.dtype}, got {x.shape[-1]}"
    return "it computes in float32, not in float64" if x.dtype == torch.float64 else None


def _fake_fwd(x, weight, bias, residual, eps):
    rows = x.new_empty(x.shape[:-1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(0) if residual is None else torch.empty_like(y), rows, torch.empty_like(rows)


def _fake_bwd(dy, dstream, x, weight, mean, rstd):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(weight), torch.empty_like(weight)


def _case(*shape, bias=True, residual=False, mean=0.0):
    def make(generator):
        def draw(*size):
            return torch.randn(size, generator=generator, dtype=torch.float64)

        inputs = {"x": draw(*shape) + mean, "weight": 1 + 0.5 * draw(shape[-1])}
        if bias:
            inputs["bias"] = draw(shape[-1])
        if residual:
            inputs["residual"] = draw(*shape)
        return inputs

    return make


_SCHEMAS = {
    "fwd": "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    "bwd": "(Tensor dy, Tensor? dstream, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> "
    "(Tensor, Tensor, Tensor)",
}

OP = Op(
    name="layer_norm",
    function=layer_norm,
    reference=layer_norm_reference,
    torch_peer=_torch_peer,
    schemas=_SCHEMAS,
    fakes={"fwd": _fake_fwd, "bwd": _fake_bwd},
    backends={
        "reference": Backend(kernels={"fwd": _reference_fwd, "bwd": _reference_bwd}, devices=("cpu", "cuda")),
        "cpu": Backend(
            kernels={s: _extension.cpu_kernel(f"layer_norm_{s}") for s in _SCHEMAS},
            devices=("cpu",),
            missing=lambda: _extension.why_missing("layer_norm_fwd", "layer_norm_bwd"),
        ),
        "triton": Backend(
            kernels={s: _triton.launcher("layer_norm", f"launch_layer_norm_{s}") for s in _SCHEMAS},
            devices=("cuda", "cpu"),
            missing=_triton.missing,
            refuses={
                "fwd": lambda x, *_: _triton.refuses_rows(x),
                "bwd": lambda dy, ds, x, *_: _triton.refuses_rows(x),
            },
        ),
        "cuda": Backend(
            kernels={s: _extension.cuda_kernel(f"layer_norm_{s}") for s in _SCHEMAS},
            devices=("cuda",),
            missing=lambda: _extension.why_cuda_missing("layer_norm_fwd", "layer_norm_bwd"),
            refuses={"fwd": lambda x, *_: _cuda_refuses(x), "bwd": lambda dy, ds, x, *_: _cuda_refuses(x)},
        ),
    },
    cases=(
        Case("tiny", _case(2, 3, 8, residual=True), gradcheck=True),
        Case("tiny_plain", _case(3, 5, bias=False), gradcheck=True),
        Case("one_element", _case(3, 1)),
        Case("no_rows", _case(0, 16, residual=True)),
        *(Case(f"width_{C}", _case(7, C, residual=True)) for C in (7, 63, 65, 257, 768, 1000)),
        Case("many_rows", _case(41, 24, residual=True)),
        Case("large_mean", _case(5, 96, mean=1000.0), dtypes=(torch.float32,)),
    ),
    bad_cases=(
        BadCase(
            "weight_shape",
            lambda: {"x": torch.ones(2, 4), "weight": torch.ones(3)},
            ValueError,
            r"weight must be \(4,\)",
        ),
        BadCase(
            "bias_dtype",
            lambda: {"x": torch.ones(2, 4), "weight": torch.ones(4), "bias": torch.ones(4).half()},
            TypeError,
            "bias must be torch.float32",
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
