"""y = relu(x weight^T + bias): the first half of the transformer's feed-forward layer (Vaswani et al., 2017)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from warploom.ops import _extension
from warploom.ops._op import Backend, BadCase, BenchCase, Case, Op


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return relu(x weight^T + bias), (..., F) in x's dtype.

    x: (..., C); weight: (F, C), torch.nn.Linear's layout; bias: (F,); one floating dtype. Products accumulate in
    float32 (float64 for float64) and are rounded once. Where the sum is not positive the gradient is zero.
    Raises ValueError for a wrong shape, TypeError for a wrong or mixed dtype.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must be (F, C) to match x {tuple(x.shape)}, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},) to match weight, got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} must be {x.dtype} as x is, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} as x is, got {tensor.device}")
    return _LinearReLU.apply(x, weight, bias)


class _LinearReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        y = torch.ops.warploom.linear_relu_fwd.default(x, weight, bias)
        ctx.save_for_backward(x, weight, y)  # y > 0 is the derivative: the sum before the relu is not kept
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dx, dweight, dbias = torch.ops.warploom.linear_relu_bwd.default(dy, *ctx.saved_tensors)
        return dx, dweight, dbias if ctx.has_bias else None


def linear_relu_reference(x, weight, bias=None):
    return F.linear(x, weight, bias).relu()


def _reference_fwd(x, weight, bias):
    return F.linear(x, weight, bias).relu_()


def _reference_bwd(dy, x, weight, y):
    dh = torch.where(y > 0, dy, 0.0)
    dx = dh @ weight
    rows = torch.atleast_2d(dh).flatten(0, -2)  # (N, F)
    dweight = rows.mT @ torch.atleast_2d(x).flatten(0, -2)
    return dx, dweight, rows.sum(0)


def _fake_fwd(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_bwd(dy, x, weight, y):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return dx, dweight, weight.new_empty(weight.shape[0])


def _case(*shape, C, bias=True):
    """shape: x's leading dimensions, then F."""

    def make(generator):
        def draw(*size):
            return torch.randn(size, generator=generator, dtype=torch.float64)

        inputs = {"x": draw(*shape[:-1], C), "weight": draw(shape[-1], C) * C**-0.5}
        if bias:
            inputs["bias"] = draw(shape[-1])
        return inputs

    return make


def _bad(name, match, error=ValueError, **changed):
    good = {"x": torch.ones(2, 4), "weight": torch.ones(3, 4), "bias": torch.ones(3)}
    return BadCase(name, lambda: {**good, **changed}, error, match)


def _bench(N, C, width):
    return BenchCase(
        f"{N}x{C}x{width}",
        _case(N, width, C=C),
        flops=2 * N * C * width,
        backward_flops=4 * N * C * width,
        bytes_per_element=N * C + C * width + N * width,
        backward_bytes_per_element=2 * (N * C + C * width + N * width),
    )


_SCHEMAS = {
    "fwd": "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "bwd": "(Tensor dy, Tensor x, Tensor weight, Tensor y) -> (Tensor, Tensor, Tensor)",
}

OP = Op(
    name="linear_relu",
    function=linear_relu,
    reference=linear_relu_reference,
    torch_peer=linear_relu_reference,  # addmm then relu is also what a torch user writes
    schemas=_SCHEMAS,
    fakes={"fwd": _fake_fwd, "bwd": _fake_bwd},
    backends={
        "reference": Backend(kernels={"fwd": _reference_fwd, "bwd": _reference_bwd}, devices=("cpu", "cuda")),
        "cpu": Backend(
            kernels={s: _extension.cpu_kernel(f"linear_relu_{s}") for s in _SCHEMAS},
            devices=("cpu",),
            missing=lambda: _extension.why_missing("linear_relu_fwd", "linear_relu_bwd"),
        ),
    },
    cases=(
        Case("tiny", _case(2, 3, 5, C=4), gradcheck=True),
        Case("tiny_plain", _case(3, 5, C=4, bias=False), gradcheck=True),
        Case("one_row", _case(6, C=9)),
        Case("one_element", _case(1, 1, C=1)),
        Case("no_rows", _case(0, 8, C=4)),
        *(
            Case(f"{N}x{C}x{width}", _case(N, width, C=C))
            for N, C, width in ((7, 63, 65), (33, 128, 257), (130, 96, 384))
        ),
        Case("batched", _case(2, 3, 64, C=48)),
    ),
    bad_cases=(
        _bad("weight_shape", r"weight must be \(F, C\)", weight=torch.ones(3, 5)),
        _bad("bias_shape", r"bias must be \(3,\)", bias=torch.ones(4)),
        _bad("bias_dtype", "bias must be torch.float32", TypeError, bias=torch.ones(3).half()),
        _bad("weight_dtype", "weight must be torch.float32", TypeError, weight=torch.ones(3, 4).double()),
        _bad("integers", "x must be floating", TypeError, x=torch.ones(2, 4, dtype=torch.int64)),
    ),
    bench_cases=(_bench(4096, 384, 1536), _bench(1024, 768, 3072)),
)
