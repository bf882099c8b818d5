"""The three projections of attention, of one input: q, k, v = x weight^T + bias with three weights.

Their gradients of x are one sum of three products, which stays in the accumulators, and x is packed once for the
gradients of the three weights. The weights stay separate parameters, as their optimizers want them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from warploom.ops import _extension, _triton
from warploom.ops._op import Backend, BadCase, BenchCase, Case, Op
from warploom.ops.linear import (
    PackedWeight,
    check_parameters,
    is_forward_left_to_torch,
    is_left_to_torch,
    left_to_cublas,
    refuses_empty,
    rounded,
)


def linear_qkv(
    x: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    packed: Sequence[PackedWeight | None] = (None, None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x weight^T + bias for each of the three, (..., F_q), (..., F_k), (..., F_v) in x's dtype.

    x: (..., C); weights: (F, C) each, of one dtype, x's or, for 16-bit x, float32; biases: (F,) of that dtype, all
    three or none. packed: what is kept of each weight; see linear. Raises ValueError for a wrong shape, TypeError for a
    wrong dtype.
    """
    weights, biases = (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias)
    for name, weight, bias in zip("qkv", weights, biases, strict=True):
        check_parameters(x, weight, bias, f"{name}_")
        if weight.dtype != q_weight.dtype:
            raise TypeError(f"{name}_weight must be {q_weight.dtype} as q_weight is, got {weight.dtype}")
        if (bias is None) != (q_bias is None):
            raise ValueError(f"{name}_bias must be given if and only if q_bias is")
    panels = [None if p is None else p.panels(weight, x.dtype) for p, weight in zip(packed, weights, strict=True)]
    return _LinearQkv.apply(x, *weights, *biases, *panels)


class _LinearQkv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *parameters):
        weights, biases, panels = parameters[:3], parameters[3:6], parameters[6:]
        ctx.save_for_backward(x, *weights, *panels)
        ctx.has_bias = biases[0] is not None
        return tuple(torch.ops.warploom.linear_qkv_fwd.default(x, weights, biases, panels))

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        x, *saved = ctx.saved_tensors
        need_dx, need_dweight = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:7])
        dx, dweights, dbiases = torch.ops.warploom.linear_qkv_bwd.default(
            x, dys, saved[:3], saved[3:], need_dx, need_dweight, ctx.has_bias and need_dweight
        )
        dbiases = dbiases or [None] * 3
        dweights = dweights or [None] * 3
        return dx if need_dx else None, *dweights, *dbiases, *(None,) * 3


def linear_qkv_reference(
    x, q_weight, k_weight, v_weight, q_bias=None, k_bias=None, v_bias=None, packed=(None, None, None)
):
    pairs = ((q_weight, q_bias), (k_weight, k_bias), (v_weight, v_bias))
    return tuple(F.linear(x, w.to(x.dtype), None if b is None else b.to(x.dtype)) for w, b in pairs)


def _reference_fwd(x, weights, biases, panels):
    weights = [rounded(w, p, x.dtype) for w, p in zip(weights, panels, strict=True)]
    return list(linear_qkv_reference(x, *weights, *biases))


def _reference_bwd(x, dys, weights, panels, need_dx, need_dweight, need_dbias):
    rows = [torch.atleast_2d(dy).flatten(0, -2) for dy in dys]
    dx = x.new_empty(0)
    if need_dx:
        narrow = [rounded(w, p, x.dtype) for w, p in zip(weights, panels, strict=True)]
        dx = rows[0] @ narrow[0]
        for dy, weight in zip(rows[1:], narrow[1:], strict=True):
            dx.addmm_(dy, weight)
        dx = dx.view(x.shape)
    x_rows = torch.atleast_2d(x).flatten(0, -2)
    dweights = [(dy.mT @ x_rows).to(w.dtype) for dy, w in zip(rows, weights, strict=True)] if need_dweight else []
    dbiases = [dy.sum(0, dtype=w.dtype) for dy, w in zip(rows, weights, strict=True)] if need_dbias else []
    return dx, dweights, dbiases


def _fake_fwd(x, weights, biases, panels):
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]


def _fake_bwd(x, dys, weights, panels, need_dx, need_dweight, need_dbias):
    dx = x.new_empty(x.shape if need_dx else 0)
    dweights = [weight.new_empty(weight.shape) for weight in weights] if need_dweight else []
    return dx, dweights, [weight.new_empty(weight.shape[:1]) for weight in weights] if need_dbias else []


def _case(*leading, C, widths, bias=True):
    def make(generator):
        def draw(*size):
            return torch.randn(size, generator=generator, dtype=torch.float64)

        inputs = {"x": draw(*leading, C)}
        for name, width in zip("qkv", widths, strict=True):
            inputs[f"{name}_weight"] = draw(width, C) * max(C, 1) ** -0.5
            if bias:
                inputs[f"{name}_bias"] = draw(width)
        return inputs

    return make


def _bad(name, match, error=ValueError, **changed):
    weights = {f"{name}_weight": torch.ones(3, 4) for name in "qkv"}
    biases = {f"{name}_bias": torch.ones(3) for name in "qkv"}
    return BadCase(name, lambda: {"x": torch.ones(2, 4), **weights, **biases, **changed}, error, match)


def _bench(N, C):
    return BenchCase(
        f"{N}x{C}",
        _case(N, C=C, widths=(C, C, C)),
        flops=6 * N * C * C,
        backward_flops=12 * N * C * C,
        bytes_per_element=4 * N * C + 3 * C * C,
        backward_bytes_per_element=5 * N * C + 6 * C * C,
    )


_PARAMETERS = tuple(f"{name}_{kind}" for name in "qkv" for kind in ("weight", "bias"))

OP = Op(
    name="linear_qkv",
    function=linear_qkv,
    reference=linear_qkv_reference,
    torch_peer=linear_qkv_reference,
    schemas={
        "fwd": "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor?[] panels) -> Tensor[]",
        "bwd": "(Tensor x, Tensor[] dys, Tensor[] weights, Tensor?[] panels, bool need_dx, bool need_dweight, "
        "bool need_dbias) -> (Tensor, Tensor[], Tensor[])",
    },
    fakes={"fwd": _fake_fwd, "bwd": _fake_bwd},
    backends={
        "reference": Backend(kernels={"fwd": _reference_fwd, "bwd": _reference_bwd}, devices=("cpu", "cuda")),
        "cpu": Backend(
            kernels={s: _extension.cpu_kernel(f"linear_qkv_{s}") for s in ("fwd", "bwd")},
            devices=("cpu",),
            missing=lambda: _extension.why_missing("linear_qkv_fwd", "linear_qkv_bwd", "linear_pack"),
            refuses={
                "fwd": lambda x, weights, *_: refuses_empty(*weights),
                "bwd": lambda x, dys, weights, *_: refuses_empty(*weights),
            },
            slower={
                "fwd": lambda x, weights, *_: is_forward_left_to_torch(x, "none", *weights),
                "bwd": lambda x, *_: is_left_to_torch(x, "none"),
            },
            leaves="float32 of more than 16 rows",
        ),
        "triton": Backend(
            kernels={s: _triton.launcher("linear_qkv", f"launch_linear_qkv_{s}") for s in ("fwd", "bwd")},
            devices=("cuda", "cpu"),
            missing=_triton.missing,
            refuses={s: lambda x, *_: _triton.refuses_product(x) for s in ("fwd", "bwd")},
            slower={s: lambda x, *_: left_to_cublas(x, "none") for s in ("fwd", "bwd")},
        ),
    },
    cases=(
        Case("tiny", _case(2, 3, C=4, widths=(4, 2, 2)), gradcheck=True),
        Case("tiny_plain", _case(3, C=4, widths=(2, 3, 5), bias=False), gradcheck=True),
        Case("one_row", _case(C=9, widths=(9, 3, 3))),
        Case("no_rows", _case(0, C=4, widths=(4, 4, 4))),
        Case("no_inputs", _case(5, C=0, widths=(4, 2, 2))),
        Case("no_outputs", _case(5, C=4, widths=(0, 0, 0))),
        Case("no_keys", _case(5, C=4, widths=(4, 0, 0))),
        Case("grouped", _case(2, 37, C=96, widths=(96, 32, 32))),
        Case("ragged", _case(70, C=63, widths=(65, 31, 33))),
        Case("whole_tiles", _case(128, C=64, widths=(64, 64, 64))),
        Case(
            "float32_weights",
            _case(40, C=64, widths=(64, 32, 32)),
            dtypes=(torch.bfloat16, torch.float16),
            wide=_PARAMETERS,
        ),
    ),
    bad_cases=(
        _bad("weight_shape", r"k_weight must be \(F, C\)", k_weight=torch.ones(3, 5)),
        _bad("bias_shape", r"v_bias must be \(3,\)", v_bias=torch.ones(4)),
        _bad("some_biases", "k_bias must be given if and only if q_bias is", k_bias=None),
        _bad("weight_dtype", "q_weight must be torch.float32", TypeError, q_weight=torch.ones(3, 4).double()),
        _bad("integers", "x must be floating", TypeError, x=torch.ones(2, 4, dtype=torch.int64)),
    ),
    bench_cases=(_bench(4096, 384), _bench(1024, 768)),
)
