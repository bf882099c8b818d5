"""y = activation(x gate_weight^T + gate_bias) * (x up_weight^T + up_bias): the gated linear units, SwiGLU and GEGLU
among them (Shazeer, 2020), without the layer that brings y back to C."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from warploom.errors import nearest
from warploom.ops import _extension, _triton
from warploom.ops._op import Backend, BadCase, BenchCase, Case, Op
from warploom.ops.linear import (
    ACTIVATIONS,
    DERIVATIVES,
    PackedWeight,
    check_parameters,
    is_forward_left_to_torch,
    is_left_to_torch,
    refuses_empty,
    rounded,
)

GATES = ("silu", "gelu_tanh")


def linear_glu(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "silu",
    packed: Sequence[PackedWeight | None] = (None, None),
) -> Tensor:
    """Return activation(x gate_weight^T + gate_bias) * (x up_weight^T + up_bias), (..., F) in x's dtype.

    x: (..., C); weights: (F, C), of one dtype, x's or, for 16-bit x, float32; biases: (F,) of that dtype, both or none.
    activation: one of GATES. packed: what is kept of each weight; see linear. Raises ValueError for a wrong shape or
    activation, TypeError for a wrong dtype.
    """
    check_parameters(x, gate_weight, gate_bias, "gate_")
    check_parameters(x, up_weight, up_bias, "up_")
    if up_weight.shape != gate_weight.shape:
        raise ValueError(
            f"up_weight must be {tuple(gate_weight.shape)} as gate_weight is, got {tuple(up_weight.shape)}"
        )
    if up_weight.dtype != gate_weight.dtype:
        raise TypeError(f"up_weight must be {gate_weight.dtype} as gate_weight is, got {up_weight.dtype}")
    if (up_bias is None) != (gate_bias is None):
        raise ValueError("up_bias must be given if and only if gate_bias is")
    if activation not in GATES:
        raise ValueError(
            f"activation must be one of {', '.join(GATES)}, got {activation!r}{nearest(activation, GATES)}"
        )
    weights = (gate_weight, up_weight)
    panels = [None if p is None else p.panels(weight, x.dtype) for p, weight in zip(packed, weights, strict=True)]
    return _LinearGlu.apply(x, *weights, gate_bias, up_bias, *panels, activation)


class _LinearGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate_weight, up_weight, gate_bias, up_bias, gate_panels, up_panels, activation):
        weights, panels = (gate_weight, up_weight), (gate_panels, up_panels)
        need_saved = any(ctx.needs_input_grad)
        y, gate, up = torch.ops.warploom.linear_glu_fwd.default(
            x, weights, (gate_bias, up_bias), panels, activation, need_saved
        )
        ctx.save_for_backward(x, gate, up, *weights, *panels)
        ctx.has_bias, ctx.activation = gate_bias is not None, activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, gate, up, *saved = ctx.saved_tensors
        need_dx, need_dweight = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:5])
        dx, dweights, dbiases = torch.ops.warploom.linear_glu_bwd.default(
            dy, x, saved[:2], saved[2:], gate, up, ctx.activation, need_dx, need_dweight, ctx.has_bias and need_dweight
        )
        return dx if need_dx else None, *(dweights or [None] * 2), *(dbiases or [None] * 2), *(None,) * 3


def linear_glu_reference(
    x, gate_weight, up_weight, gate_bias=None, up_bias=None, activation="silu", packed=(None, None)
):
    pairs = ((gate_weight, gate_bias), (up_weight, up_bias))
    gate, up = (F.linear(x, w.to(x.dtype), None if b is None else b.to(x.dtype)) for w, b in pairs)
    return ACTIVATIONS[activation](gate) * up


def _reference_fwd(x, weights, biases, panels, activation, need_saved):
    gate, up = (
        F.linear(x, rounded(w, p, x.dtype), None if b is None else b.to(x.dtype))
        for w, p, b in zip(weights, panels, biases, strict=True)
    )
    y = ACTIVATIONS[activation](gate) * up
    return (y, gate, up) if need_saved else (y, x.new_empty(0), x.new_empty(0))


def _reference_bwd(dy, x, weights, panels, gate, up, activation, need_dx, need_dweight, need_dbias):
    dgate, dup = DERIVATIVES[activation](dy * up, gate), dy * ACTIVATIONS[activation](gate)
    rows = [torch.atleast_2d(d).flatten(0, -2) for d in (dgate, dup)]
    dx = x.new_empty(0)
    if need_dx:
        gate_weight, up_weight = (rounded(w, p, x.dtype) for w, p in zip(weights, panels, strict=True))
        dx = torch.addmm(rows[0] @ gate_weight, rows[1], up_weight).view(x.shape)
    x_rows = torch.atleast_2d(x).flatten(0, -2)
    dweights = [(d.mT @ x_rows).to(w.dtype) for d, w in zip(rows, weights, strict=True)] if need_dweight else []
    dbiases = [d.sum(0, dtype=w.dtype) for d, w in zip(rows, weights, strict=True)] if need_dbias else []
    return dx, dweights, dbiases


# On the CPU it is two calls of linear's kernels, which take the gate's activation in their epilogue and prologue.


def _cpu_fwd(x, weights, biases, panels, activation, need_saved):
    linear_fwd = _extension.cpu_kernel("linear_fwd")
    y, gate = linear_fwd(x, weights[0], biases[0], panels[0], activation, need_saved)
    up, _ = linear_fwd(x, weights[1], biases[1], panels[1], "none", False)
    y.mul_(up)
    return y, gate, up if need_saved else x.new_empty(0)


def _cpu_bwd(dy, x, weights, panels, gate, up, activation, need_dx, need_dweight, need_dbias):
    linear_bwd = _extension.cpu_kernel("linear_bwd")
    needs = (need_dx, need_dweight, need_dbias)
    dx, *of_gate = linear_bwd(dy * up, x, weights[0], panels[0], gate, activation, *needs)
    d_up = dy * ACTIVATIONS[activation](gate)
    more_dx, *of_up = linear_bwd(d_up, x, weights[1], panels[1], x.new_empty(0), "none", *needs)
    dweights, dbiases = ([a, b] for a, b in zip(of_gate, of_up, strict=True))
    return dx.add_(more_dx), dweights if need_dweight else [], dbiases if need_dbias else []


def _fake_fwd(x, weights, biases, panels, activation, need_saved):
    y = x.new_empty((*x.shape[:-1], weights[0].shape[0]))
    return y, *(torch.empty_like(y) if need_saved else x.new_empty(0) for _ in range(2))


def _fake_bwd(dy, x, weights, panels, gate, up, activation, need_dx, need_dweight, need_dbias):
    dweights = [weight.new_empty(weight.shape) for weight in weights] if need_dweight else []
    dbiases = [weight.new_empty(weight.shape[:1]) for weight in weights] if need_dbias else []
    return x.new_empty(x.shape if need_dx else 0), dweights, dbiases


def _case(*shape, C, bias=True, activation="silu"):
    """shape: x's leading dimensions, then F."""

    def make(generator):
        def draw(*size):
            return torch.randn(size, generator=generator, dtype=torch.float64)

        inputs = {"x": draw(*shape[:-1], C), "activation": activation}
        for name in ("gate", "up"):
            inputs[f"{name}_weight"] = draw(shape[-1], C) * max(C, 1) ** -0.5
            if bias:
                inputs[f"{name}_bias"] = draw(shape[-1])
        return inputs

    return make


def _bad(name, match, error=ValueError, **changed):
    weights = {f"{name}_weight": torch.ones(3, 4) for name in ("gate", "up")}
    biases = {f"{name}_bias": torch.ones(3) for name in ("gate", "up")}
    return BadCase(name, lambda: {"x": torch.ones(2, 4), **weights, **biases, **changed}, error, match)


def _bench(N, C, width, activation="silu"):
    return BenchCase(
        f"{N}x{C}x{width}_{activation}",
        _case(N, width, C=C, bias=False, activation=activation),
        flops=4 * N * C * width,
        backward_flops=8 * N * C * width,
        bytes_per_element=N * C + 2 * C * width + N * width,
        backward_bytes_per_element=2 * N * C + 4 * C * width + 3 * N * width,
    )


def _float32_left_to_torch(x, *_):
    return "cuBLAS is faster in float32" if x.dtype == torch.float32 else None


OP = Op(
    name="linear_glu",
    function=linear_glu,
    reference=linear_glu_reference,
    torch_peer=linear_glu_reference,
    schemas={
        "fwd": "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor?[] panels, str activation, bool need_saved) -> "
        "(Tensor, Tensor, Tensor)",
        "bwd": "(Tensor dy, Tensor x, Tensor[] weights, Tensor?[] panels, Tensor gate, Tensor up, str activation, "
        "bool need_dx, bool need_dweight, bool need_dbias) -> (Tensor, Tensor[], Tensor[])",
    },
    fakes={"fwd": _fake_fwd, "bwd": _fake_bwd},
    backends={
        "reference": Backend(kernels={"fwd": _reference_fwd, "bwd": _reference_bwd}, devices=("cpu", "cuda")),
        "cpu": Backend(
            kernels={"fwd": _cpu_fwd, "bwd": _cpu_bwd},
            devices=("cpu",),
            missing=lambda: _extension.why_missing("linear_fwd", "linear_bwd", "linear_pack"),
            refuses={
                "fwd": lambda x, weights, *_: refuses_empty(*weights),
                "bwd": lambda dy, x, weights, *_: refuses_empty(*weights),
            },
            slower={
                "fwd": lambda x, weights, *_: is_forward_left_to_torch(x, "none", *weights),
                "bwd": lambda dy, x, *_: is_left_to_torch(x, "none"),
            },
            leaves="float32 of more than 16 rows",
        ),
        "triton": Backend(
            kernels={s: _triton.launcher("linear_glu", f"launch_linear_glu_{s}") for s in ("fwd", "bwd")},
            devices=("cuda", "cpu"),
            missing=_triton.missing,
            refuses={
                "fwd": lambda x, *_: _triton.refuses_product(x),
                "bwd": lambda dy, x, *_: _triton.refuses_product(x),
            },
            slower={"fwd": _float32_left_to_torch, "bwd": _float32_left_to_torch},
        ),
    },
    cases=(
        Case("tiny", _case(2, 3, 5, C=4), gradcheck=True),
        Case("tiny_gelu", _case(3, 5, C=4, bias=False, activation="gelu_tanh"), gradcheck=True),
        Case("one_row", _case(6, C=9)),
        Case("one_element", _case(1, 1, C=1)),
        Case("no_rows", _case(0, 8, C=4)),
        Case("no_inputs", _case(5, 8, C=0)),
        Case("no_outputs", _case(5, 0, C=8)),
        Case("ragged", _case(70, 65, C=63)),
        Case("whole_tiles", _case(128, 64, C=96, bias=False)),
        Case("ragged_gelu", _case(33, 130, C=40, activation="gelu_tanh")),
        Case(
            "float32_weights",
            _case(40, 90, C=64),
            dtypes=(torch.bfloat16, torch.float16),
            wide=("gate_weight", "up_weight", "gate_bias", "up_bias"),
        ),
    ),
    bad_cases=(
        _bad("gate_shape", r"gate_weight must be \(F, C\)", gate_weight=torch.ones(3, 5)),
        _bad(
            "up_shape",
            r"up_weight must be \(3, 4\) as gate_weight is",
            up_weight=torch.ones(2, 4),
            up_bias=torch.ones(2),
        ),
        _bad("bias_shape", r"up_bias must be \(3,\)", up_bias=torch.ones(4)),
        _bad("one_bias", "up_bias must be given if and only if gate_bias is", up_bias=None),
        _bad("weight_dtype", "gate_weight must be torch.float32", TypeError, gate_weight=torch.ones(3, 4).double()),
        _bad("integers", "x must be floating", TypeError, x=torch.ones(2, 4, dtype=torch.int64)),
        _bad("activation", "activation must be one of silu, gelu_tanh, got 'swish'", activation="swish"),
    ),
    bench_cases=(_bench(4096, 384, 1024), _bench(1024, 768, 2048), _bench(1024, 768, 2048, "gelu_tanh")),
)
