"""y = activation(x weight^T + bias): every dense layer of a transformer, its feed-forward GEMM with the ReLU fused in
(Vaswani et al., 2017) among them.

The weight may be a float32 master of 16-bit activations: it is rounded on its way into the product, and its gradient
leaves the accumulator unrounded. PackedWeight keeps what the product reads of a weight that is used more than once.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from warploom.errors import nearest
from warploom.ops import _cublaslt, _extension, _triton
from warploom.ops._op import Backend, BadCase, BenchCase, Case, Op

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda h: h,
    "relu": torch.relu,
    "relu2": lambda h: torch.relu(h).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
}
# (dy, saved) -> dh; what is saved is y or a bit mask for "relu" and h for the others.
DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda dy, _: dy,
    "relu": lambda dy, saved: torch.where(_positive(saved, dy.shape[-1]), dy, 0.0),
    "relu2": lambda dy, h: 2 * dy * torch.relu(h),
    "gelu": lambda dy, h: torch.ops.aten.gelu_backward(dy, h),
    "gelu_tanh": lambda dy, h: torch.ops.aten.gelu_backward(dy, h, approximate="tanh"),
    "silu": lambda dy, h: torch.ops.aten.silu_backward(dy, h),
}


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    packed: PackedWeight | None = None,
) -> Tensor:
    """Return activation(x weight^T + bias), (..., F) in x's dtype.

    x: (..., C), any floating dtype; weight: (F, C), torch.nn.Linear's layout; bias: (F,). weight and bias have one
    dtype, x's or, for 16-bit x, float32. activation: a key of ACTIVATIONS. Products accumulate in float32 (float64 for
    float64); the sum is rounded once for the activation's output, and once where the backward needs it before the
    activation. Gradients of weight and bias have their dtype. A ReLU whose input is not positive has gradient zero.
    packed: what PackedWeight keeps of this very weight; without it every call packs the weight anew.
    Raises ValueError for a wrong shape or activation, TypeError for a wrong dtype.
    """
    check_parameters(x, weight, bias)
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        hint = nearest(activation, ACTIVATIONS)
        raise ValueError(f"activation must be one of {known}, got {activation!r}{hint}")
    panels = None if packed is None else packed.panels(weight, x.dtype)
    return _Linear.apply(x, weight, bias, panels, activation)


def check_parameters(x: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> None:
    """Raise ValueError or TypeError unless weight (F, C) and bias (F,) go with x (..., C); prefix: of their names."""
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"{prefix}weight must be (F, C) to match x {tuple(x.shape)}, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{prefix}bias must be ({weight.shape[0]},) to match its weight, got {tuple(bias.shape)}")
    if weight.dtype != x.dtype and (weight.dtype != torch.float32 or x.dtype == torch.float64):
        raise TypeError(f"{prefix}weight must be {x.dtype} as x is, or torch.float32, got {weight.dtype}")
    if bias is not None and bias.dtype != weight.dtype:
        raise TypeError(f"{prefix}bias must be {weight.dtype} as its weight is, got {bias.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{prefix}{name} must be on {x.device} as x is, got {tensor.device}")


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return relu(x weight^T + bias): linear with that activation."""
    return linear(x, weight, bias, "relu")


class PackedWeight:
    """What products read of one weight, kept from use to use and made anew when the weight has changed.

    A change is seen by the version counter that torch keeps of every tensor, and by the values of a few elements:
    torch's fused optimizers, and writes through `.data`, change a tensor without counting. Writing to a part of the
    weight in such a way goes unseen. Takes as much memory as the weight in the activations' dtype: in the forward's
    order, which the backward turns into its own. Where no kernel packs (dtype, device, back end) it is idle.

    On a GPU it is a copy of the weight in the activations' dtype, and a change is seen by the version counter
    alone, since comparing values would wait for the device: step such weights with warploom.optim.
    """

    def __init__(self) -> None:
        self._panels: Tensor | None = None
        self._of: weakref.ref[Tensor] | None = None
        self._dtype: torch.dtype | None = None
        self._address = 0  # of the weight's first element
        self._version = -1
        self._watched: Tensor | None = None  # elements of the weight, a view
        self._sample: Tensor | None = None  # their values at the time of packing

    def panels(self, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return the panels of the weight as it is now, for activations of this dtype; None where none are read."""
        if weight.device.type == "cuda" or OP.forced() == "triton":
            return self._copy(weight, dtype)
        if not _packs(dtype) or not _has_kernel(weight.device.type) or (OP.forced() or "cpu") != "cpu":
            return None
        panels = self._allocated(weight, dtype)
        if weight._version != self._version or not self._sample_is_as_it_was():
            torch.ops.warploom_cpu.linear_pack(weight.detach(), dtype, panels)
            self.now_hold(weight)
        return panels

    def _copy(self, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        if weight.dtype == dtype:
            return None
        if not self._is_of(weight, dtype):
            self._panels = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
            self._begin(weight, dtype)
        assert self._panels is not None
        if weight._version != self._version:
            self._panels.copy_(weight.detach())
            self._version = weight._version
        return self._panels

    def memory_for(self, weight: Tensor) -> Tensor | None:
        """Return the memory of the panels for bfloat16 activations, for who is about to change the weight and writes
        them too, and then says now_hold(weight); None where no panels are in use."""
        return self._panels if self._is_of(weight, torch.bfloat16) and weight.is_contiguous() else None

    def now_hold(self, weight: Tensor) -> None:
        """Take the panels for those of the weight as it is now."""
        self._version = weight._version
        if self._watched is not None:
            self._sample = self._watched.clone()

    def _is_of(self, weight: Tensor, dtype: torch.dtype) -> bool:
        return (
            self._of is not None
            and self._of() is weight
            and self._dtype == dtype
            and self._address == weight.data_ptr()  # which `weight.data = other` changes
        )

    def _sample_is_as_it_was(self) -> bool:
        return self._watched is not None and self._sample is not None and torch.equal(self._watched, self._sample)

    def _begin(self, weight: Tensor, dtype: torch.dtype) -> None:
        self._of, self._dtype, self._address = weakref.ref(weight), dtype, weight.data_ptr()
        self._version, self._watched, self._sample = -1, None, None

    def _allocated(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the memory of the panels, whatever is in it."""
        if not self._is_of(weight, dtype):
            size = torch.ops.warploom_cpu.linear_packed_bytes(weight.detach(), dtype)
            self._panels = torch.empty(size, dtype=torch.uint8)
            self._begin(weight, dtype)
            F, C = weight.shape
            self._watched = weight.detach()[:: max(1, F // 8), :: max(1, C // 4)]
        assert self._panels is not None
        return self._panels

    def __deepcopy__(self, memo: dict) -> PackedWeight:
        return PackedWeight()  # of another weight, whose panels are made at its first use

    def __reduce__(self) -> tuple:
        return PackedWeight, ()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, panels, activation):
        # ReLU's derivative is where its output is positive; the others are taken from the sum before the activation.
        # The backward of a GPU reads that as a bit mask, a sixteenth of the output; on a CPU packing bits costs more.
        masked = activation == "relu" and (x.device.type == "cuda" or OP.forced() in ("triton", "cuda", "cublaslt"))
        reads_y = activation == "relu" and not masked
        need_saved = activation != "none" and not reads_y and any(ctx.needs_input_grad)
        y, saved = torch.ops.warploom.linear_fwd.default(x, weight, bias, panels, activation, need_saved)
        ctx.save_for_backward(x, weight, panels, y if reads_y else saved)
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        need_dx, need_dweight, need_dbias = ctx.needs_input_grad[:3]
        # The bias gradient is summed on the way to the weight's.
        needs = (need_dx, need_dweight or need_dbias, need_dbias)
        dx, dweight, dbias = torch.ops.warploom.linear_bwd.default(dy, *ctx.saved_tensors, ctx.activation, *needs)
        return dx if need_dx else None, dweight if need_dweight else None, dbias if need_dbias else None, None, None


def linear_reference(x, weight, bias=None, activation="none", packed=None):
    h = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return ACTIVATIONS[activation](h)


def rounded(weight: Tensor, panels: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight in dtype: what PackedWeight kept of it, if that is a copy."""
    return panels if panels is not None and panels.dtype == dtype else weight.to(dtype)


def _is_transposed(weight: Tensor) -> bool:
    """Whether the weight lies in memory as (C, F), as GPT-2's (Conv1D) do. Its gradient then does too."""
    return not weight.is_contiguous() and weight.mT.is_contiguous()


def _empty_gradient(weight: Tensor) -> Tensor:
    return weight.mT.new_empty(weight.mT.shape).mT if _is_transposed(weight) else weight.new_empty(weight.shape)


def _mask_bytes(width: int) -> int:
    """Of a row of a bit mask: a multiple of 16, as cuBLASLt wants it. Its bits lie in the same order: so NVIDIA's own
    nvmath-python reads them (verify_relu_bitmask in tests/nvmath_tests/linalg/advanced/matmul/test_epilog.py)."""
    return (width + 127) // 128 * 16


def _pack_positive(h: Tensor) -> Tensor:
    """(..., F) -> (..., _mask_bytes(F)) uint8: bit f % 8 of byte f // 8 is set where h[f] > 0."""
    bits = F.pad((h > 0).to(torch.uint8), (0, 8 * _mask_bytes(h.shape[-1]) - h.shape[-1]))
    worth = 1 << torch.arange(8, dtype=torch.uint8, device=h.device)
    return (bits.unflatten(-1, (-1, 8)) * worth).sum(-1, dtype=torch.uint8)


def _positive(saved: Tensor, width: int) -> Tensor:
    """Where the sum before a ReLU was positive, by its output or by the bit mask of it."""
    if saved.dtype != torch.uint8:
        return saved > 0
    places = torch.arange(8, dtype=torch.uint8, device=saved.device)
    return ((saved.unsqueeze(-1) >> places) & 1).flatten(-2)[..., :width] != 0


def _reference_fwd(x, weight, bias, panels, activation, need_saved):
    h = F.linear(x, rounded(weight, panels, x.dtype), None if bias is None else bias.to(x.dtype))
    if activation == "relu":
        y = h.relu_()
        return y, _pack_positive(y) if need_saved else x.new_empty(0)
    y = ACTIVATIONS[activation](h)
    # An operator's outputs must not share memory.
    return y, h if need_saved and activation != "none" else x.new_empty(0)


def _reference_bwd(dy, x, weight, panels, saved, activation, need_dx, need_dweight, need_dbias):
    dh = DERIVATIVES[activation](dy, saved)
    rows = torch.atleast_2d(dh).flatten(0, -2)  # (N, F)
    dx = dh @ rounded(weight, panels, dh.dtype) if need_dx else x.new_empty(0)
    dweight = weight.new_empty(0)
    if need_dweight:
        x_rows = torch.atleast_2d(x).flatten(0, -2)
        product = (x_rows.mT @ rows).mT if _is_transposed(weight) else rows.mT @ x_rows
        dweight = product.to(weight.dtype)
    dbias = rows.sum(0, dtype=weight.dtype) if need_dbias else weight.new_empty(0)
    return dx, dweight, dbias


def _fake_fwd(x, weight, bias, panels, activation, need_saved):
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    if need_saved and activation == "relu":
        return y, x.new_empty((*x.shape[:-1], _mask_bytes(weight.shape[0])), dtype=torch.uint8)
    return y, torch.empty_like(y) if need_saved and activation != "none" else x.new_empty(0)


def _fake_bwd(dy, x, weight, panels, saved, activation, need_dx, need_dweight, need_dbias):
    dx = x.new_empty(x.shape if need_dx else 0)
    dweight = _empty_gradient(weight) if need_dweight else weight.new_empty(0)
    return dx, dweight, weight.new_empty(weight.shape[:1] if need_dbias else 0)


@functools.cache  # what is missing stays so while a process lives
def _has_kernel(device: str) -> bool:
    return OP.choice(device) == "cpu"


def _packs(dtype: torch.dtype) -> bool:
    """Whether the C++ kernels take plain products of this dtype."""
    return dtype in (torch.bfloat16, torch.float16)


def refuses_empty(*weights: Tensor) -> str | None:
    """Why the C++ kernels do not take such weights, or None."""
    shapes = [tuple(weight.shape) for weight in weights if weight.numel() == 0]
    return f"its weight has elements, got {shapes[0]}" if shapes else None


def _cpu_refuses(weight: Tensor, masked: bool) -> str | None:
    return refuses_empty(weight) or ("its backward reads ReLU's output, and no bit mask of it" if masked else None)


def _refuses_output(saved: Tensor, activation: str) -> str | None:
    if activation == "relu" and saved.dtype != torch.uint8:
        return "its backward reads a bit mask of ReLU's output, and not the output"
    return None


def is_left_to_torch(x: Tensor, activation: str) -> str | None:
    """Why a call is left to torch, None if it is not: by measurement, see docs/performance.md."""
    if activation == "none" and not _packs(x.dtype):
        return f"torch's plain product is faster in {x.dtype}"
    return None


FEW_ROWS = 16  # kFewRows of csrc/cpu/few_rows.h


def is_forward_left_to_torch(x: Tensor, activation: str, *weights: Tensor) -> str | None:
    """Why a forward call with these weights is left to torch, None if it is not.

    In float32 up to 16 rows have a kernel that reads the weight as it lies. Beyond those the weight is packed for every
    call. By measurement on one core of a Sapphire Rapids, 384 x 1536 and 768 x 3072: 32 rows take 1.1 of torch's speed
    with a GELU; 32, 128 and 256 rows 0.7, 0.86 and 0.9 to 1.0 with a ReLU, which torch has in fewer instructions.
    """
    if _packs(x.dtype):
        return None
    if x.numel() <= FEW_ROWS * x.shape[-1] and not any(_is_transposed(weight) for weight in weights):
        return None
    enough = 256 if activation in ("relu", "relu2") else 32
    if activation != "none" and x.numel() < enough * x.shape[-1]:
        return f"packing the weight for fewer than {enough} rows costs more than torch's product and {activation}"
    return is_left_to_torch(x, activation)


def _cuda_refuses(x: Tensor, weight: Tensor, activation: str) -> str | None:
    if not _packs(x.dtype):
        return f"it multiplies bfloat16 and float16, not {x.dtype}"
    if activation not in ("none", "relu"):
        return f"its activation is none or relu, not {activation}"
    if weight.numel() == 0 or any(size % 8 for size in weight.shape):
        return f"its weight is (F, C) of multiples of 8, got {tuple(weight.shape)}"
    return None


def _packing_costs_more(x: Tensor, weight: Tensor, panels: Tensor | None, activation: str) -> str | None:
    """Why a plain 16-bit product with a weight that nobody keeps packed is left to torch, None if it is not. By
    measurement on one core of a Sapphire Rapids: 32 to 1024 rows times 768 x 3072 take 0.69 to 0.94 of torch's speed,
    kept packed 1.02 to 1.34; smaller weights and more rows win or are level. A float32 master is cast by torch, and so
    never left."""
    is_packed_here = _packs(x.dtype) and panels is None and weight.dtype == x.dtype
    if activation == "none" and is_packed_here and weight.numel() >= _LARGE_WEIGHT:
        if x.numel() < _MANY_ROWS * weight.shape[1]:
            return f"packing a large {x.dtype} weight for few rows costs more than torch's product: keep it packed"
    return None


_LARGE_WEIGHT, _MANY_ROWS = 1 << 19, 2048


def left_to_cublas(x: Tensor, activation: str) -> str | None:
    """Why the back ends of GPUs leave a call to torch's products, None if they do not: without tensor cores, or with
    nothing to fuse but the bias, which cuBLAS adds for torch too."""
    if x.dtype == torch.float32:
        return "cuBLAS is faster in float32"
    return "there is no activation to fuse" if activation == "none" else None


def _case(*shape, C, bias=True, activation="none", transposed=False):
    """shape: x's leading dimensions, then F."""

    def make(generator):
        def draw(*size):
            return torch.randn(size, generator=generator, dtype=torch.float64)

        weight = draw(C, shape[-1]).mT if transposed else draw(shape[-1], C)
        inputs = {"x": draw(*shape[:-1], C), "weight": weight * max(C, 1) ** -0.5}
        if bias:
            inputs["bias"] = draw(shape[-1])
        if activation != "none":
            inputs["activation"] = activation
        return inputs

    return make


def _bad(name, match, error=ValueError, **changed):
    good = {"x": torch.ones(2, 4), "weight": torch.ones(3, 4), "bias": torch.ones(3)}
    return BadCase(name, lambda: {**good, **changed}, error, match)


def _bench(N, C, width, activation):
    return BenchCase(
        f"{N}x{C}x{width}_{activation}",
        _case(N, width, C=C, activation=activation),
        flops=2 * N * C * width,
        backward_flops=4 * N * C * width,
        bytes_per_element=N * C + C * width + N * width,
        backward_bytes_per_element=2 * (N * C + C * width + N * width),
    )


_SCHEMAS = {
    "fwd": "(Tensor x, Tensor weight, Tensor? bias, Tensor? panels, str activation, bool need_saved) -> "
    "(Tensor, Tensor)",
    "bwd": "(Tensor dy, Tensor x, Tensor weight, Tensor? panels, Tensor saved, str activation, bool need_dx, "
    "bool need_dweight, bool need_dbias) -> (Tensor, Tensor, Tensor)",
}
_HALF = (torch.bfloat16, torch.float16)

OP = Op(
    name="linear",
    function=linear,
    reference=linear_reference,
    torch_peer=linear_reference,  # addmm and the activation are also what a torch user writes
    schemas=_SCHEMAS,
    fakes={"fwd": _fake_fwd, "bwd": _fake_bwd},
    backends={
        "reference": Backend(kernels={"fwd": _reference_fwd, "bwd": _reference_bwd}, devices=("cpu", "cuda")),
        "cpu": Backend(
            kernels={s: _extension.cpu_kernel(f"linear_{s}") for s in _SCHEMAS},
            devices=("cpu",),
            missing=lambda: _extension.why_missing("linear_fwd", "linear_bwd", "linear_pack"),
            leaves="float32 of more than 16 rows (17 to 31 with an activation, 255 with ReLU), large unpacked weights",
            refuses={
                "fwd": lambda x, weight, bias, panels, activation, need_saved: _cpu_refuses(
                    weight, activation == "relu" and need_saved
                ),
                "bwd": lambda dy, x, weight, panels, saved, activation, *needs: _cpu_refuses(
                    weight, activation == "relu" and saved.dtype == torch.uint8
                ),
            },
            slower={
                "fwd": lambda x, weight, bias, panels, activation, need_saved: (
                    is_forward_left_to_torch(x, activation, weight)
                    or _packing_costs_more(x, weight, panels, activation)
                ),
                "bwd": lambda dy, x, weight, panels, saved, activation, *needs: (
                    is_left_to_torch(x, activation) or _packing_costs_more(x, weight, panels, activation)
                ),
            },
        ),
        "triton": Backend(
            kernels={s: _triton.launcher("linear", f"launch_linear_{s}") for s in _SCHEMAS},
            devices=("cuda", "cpu"),
            missing=_triton.missing,
            refuses={
                "fwd": lambda x, *_: _triton.refuses_product(x),
                "bwd": lambda dy, x, weight, panels, saved, activation, *_: (
                    _refuses_output(saved, activation) or _triton.refuses_product(x)
                ),
            },
            slower={
                "fwd": lambda x, weight, bias, panels, activation, need_saved: left_to_cublas(x, activation),
                "bwd": lambda dy, x, weight, panels, saved, activation, *needs: left_to_cublas(x, activation),
            },
        ),
        "cuda": Backend(
            kernels={s: _extension.cuda_kernel(f"linear_{s}") for s in _SCHEMAS},
            devices=("cuda",),
            missing=lambda: _extension.why_cuda_missing("linear_fwd", "linear_bwd"),
            refuses={
                "fwd": lambda x, weight, bias, panels, activation, need_saved: _cuda_refuses(x, weight, activation),
                "bwd": lambda dy, x, weight, panels, saved, activation, *_: (
                    _refuses_output(saved, activation) or _cuda_refuses(x, weight, activation)
                ),
            },
            slower={
                "fwd": lambda x, weight, bias, panels, activation, need_saved: left_to_cublas(x, activation),
                "bwd": lambda dy, x, weight, panels, saved, activation, *needs: left_to_cublas(x, activation),
            },
        ),
        # cuBLASLt's epilogues: bias, ReLU and its bit mask, as the other back ends lay it out; on the way back the sum
        # for the bias gradient. (Its DRELU masks what a product yields, and so belongs to the layer above.)
        "cublaslt": Backend(
            kernels={s: _extension.cuda_kernel(f"linear_{s}_cublaslt") for s in _SCHEMAS},
            devices=("cuda",),
            missing=lambda: _cublaslt.missing("linear_fwd_cublaslt", "linear_bwd_cublaslt"),
            refuses={
                "fwd": lambda x, weight, bias, panels, activation, need_saved: (
                    _cuda_refuses(x, weight, activation)
                    or _cublaslt.refuses_fwd(x, weight, bias, activation, need_saved)
                ),
                "bwd": lambda dy, x, weight, panels, saved, activation, need_dx, need_dweight, need_dbias: (
                    _refuses_output(saved, activation)
                    or _cuda_refuses(x, weight, activation)
                    or _cublaslt.refuses_bwd(x, weight, activation, need_dbias)
                ),
            },
            slower={
                "fwd": lambda x, weight, bias, panels, activation, need_saved: left_to_cublas(x, activation),
                "bwd": lambda dy, x, weight, panels, saved, activation, *needs: left_to_cublas(x, activation),
            },
        ),
    },
    cases=(
        Case("tiny", _case(2, 3, 5, C=4), gradcheck=True),
        Case("tiny_plain", _case(3, 5, C=4, bias=False), gradcheck=True),
        *(Case(f"tiny_{name}", _case(3, 5, C=4, activation=name), gradcheck=True) for name in ACTIVATIONS),
        Case("one_row", _case(6, C=9)),
        Case("one_element", _case(1, 1, C=1)),
        Case("no_rows", _case(0, 8, C=8)),
        Case("no_inputs", _case(5, 8, C=0)),
        Case("no_outputs", _case(5, 0, C=8)),
        *(
            Case(f"{N}x{C}x{width}_{name}", _case(N, width, C=C, activation=name))
            for N, C, width, name in (
                (7, 63, 65, "relu"),
                (33, 128, 257, "gelu_tanh"),
                (65, 80, 97, "gelu"),
                (64, 32, 31, "none"),
                (130, 96, 384, "relu2"),
                (129, 40, 80, "silu"),
                (3, 3200, 33, "relu"),
                (40, 64, 1700, "none"),
                (200, 72, 136, "relu"),
            )
        ),
        Case("batched", _case(2, 3, 64, C=48)),
        Case("sixteen_rows", _case(16, 193, C=70, activation="gelu")),
        Case("tiny_transposed", _case(3, 5, C=4, transposed=True), gradcheck=True),
        Case("transposed", _case(131, 97, C=80, transposed=True, activation="gelu")),
        Case("transposed_float32_weight", _case(70, 90, C=100, transposed=True), _HALF, wide=("weight", "bias")),
        Case("large_result", _case(1030, 1024, C=16, activation="relu")),  # large enough to go past the caches
        *(
            Case(f"float32_weight_{name}", _case(70, 90, C=100, activation=name), _HALF, wide=("weight", "bias"))
            for name in ("none", "relu", "gelu", "gelu_tanh")
        ),
        Case("of_eights_without_bias", _case(3, 9, 136, C=40, bias=False, activation="relu")),
        Case("float32_weight_of_eights", _case(70, 88, C=104, activation="relu"), _HALF, wide=("weight", "bias")),
    ),
    bad_cases=(
        _bad("weight_shape", r"weight must be \(F, C\)", weight=torch.ones(3, 5)),
        _bad("bias_shape", r"bias must be \(3,\)", bias=torch.ones(4)),
        _bad("bias_dtype", "bias must be torch.float32", TypeError, bias=torch.ones(3).half()),
        _bad("weight_dtype", "weight must be torch.float32", TypeError, weight=torch.ones(3, 4).double()),
        _bad("integers", "x must be floating", TypeError, x=torch.ones(2, 4, dtype=torch.int64)),
        _bad("activation", "activation must be one of none, relu", activation="rleu"),
    ),
    bench_cases=(
        _bench(4096, 384, 1536, "relu"),
        _bench(1024, 768, 3072, "relu"),
        _bench(1024, 768, 3072, "gelu"),
        _bench(1024, 768, 3072, "gelu_tanh"),
        _bench(4096, 384, 384, "none"),
    ),
)
