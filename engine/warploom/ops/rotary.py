"""Rotary position embedding (Su et al., 2021): feature pairs turned by an angle proportional to the position.

Pairs are half-split: feature i turns with feature i + rotary_dim / 2, as in GPT-NeoX and in Llama's published weights
for transformers (the paper turns neighbours, 2i with 2i + 1).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from warploom.ops import _extension, _triton
from warploom.ops._op import Backend, BadCase, BenchCase, Case, Op


def rotary(x: Tensor, positions: Tensor, base: float = 10000.0, rotary_dim: int | None = None) -> Tensor:
    """Turn features i and i + rotary_dim / 2 of each head by positions * base ** (-2 i / rotary_dim) radians.

    x: (B, H, T, D), any floating dtype; positions: (T,) or (B, T), int32 or int64. The features from rotary_dim on
    (default D: none) pass unchanged. Sine, cosine and the products are float32 (float64 for float64).
    Returns x's shape and dtype, laid out so that its transpose(1, 2) is contiguous.
    Raises ValueError for a wrong shape, an odd rotary_dim or one outside [0, D], a base that is not positive; TypeError
    for a wrong dtype.
    """
    if x.dim() != 4:
        raise ValueError(f"x must be (B, H, T, D), got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    B, _, T, D = x.shape
    if positions.shape not in ((T,), (B, T)):
        raise ValueError(f"positions must be ({T},) or ({B}, {T}) to match x, got {tuple(positions.shape)}")
    if positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"positions must be torch.int32 or torch.int64, got {positions.dtype}")
    if positions.device != x.device:
        raise ValueError(f"positions must be on {x.device} as x is, got {positions.device}")
    rotary_dim = D if rotary_dim is None else rotary_dim
    if rotary_dim % 2 or not 0 <= rotary_dim <= D:
        raise ValueError(f"rotary_dim must be even and in [0, {D}], got {rotary_dim}")
    if not base > 0:
        raise ValueError(f"base must be positive, got {base}")
    return _Rotary.apply(x, positions, base, rotary_dim)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, positions, base, rotary_dim):
        ctx.save_for_backward(positions)
        ctx.base, ctx.rotary_dim = base, rotary_dim
        return torch.ops.warploom.rotary_fwd.default(x, positions, base, rotary_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (positions,) = ctx.saved_tensors
        return torch.ops.warploom.rotary_bwd.default(dy, positions, ctx.base, ctx.rotary_dim), None, None, None


def _cos_sin(positions, base, rotary_dim, dtype):
    """Cosine and sine of every angle, (1 or B, 1, T, rotary_dim / 2)."""
    index = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=dtype)
    angle = positions.to(dtype)[..., None] * base ** (-index / rotary_dim)
    angle = angle[:, None] if positions.dim() == 2 else angle[None, None]
    return angle.cos(), angle.sin()


def rotary_reference(x, positions, base=10000.0, rotary_dim=None):
    rotary_dim = x.shape[-1] if rotary_dim is None else rotary_dim
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = _cos_sin(positions, base, rotary_dim, wide)
    turned, passed = x.to(wide).split([rotary_dim, x.shape[-1] - rotary_dim], -1)
    first, second = turned.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, passed], -1).to(x.dtype)


def _turn(x, positions, base, rotary_dim, direction):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = _cos_sin(positions, base, rotary_dim, wide)
    sin = direction * sin
    y = _empty_transposed(x)
    half = rotary_dim // 2
    first, second = x[..., :half].to(wide), x[..., half:rotary_dim].to(wide)
    y[..., :half] = (first * cos).addcmul_(second, sin, value=-1)
    y[..., half:rotary_dim] = (second * cos).addcmul_(first, sin)
    y[..., rotary_dim:] = x[..., rotary_dim:]
    return y


def _reference_fwd(x, positions, base, rotary_dim):
    return _turn(x, positions, base, rotary_dim, 1)


def _reference_bwd(dy, positions, base, rotary_dim):
    return _turn(dy, positions, base, rotary_dim, -1)


def _empty_transposed(x):
    B, H, T, D = x.shape
    return x.new_empty((B, T, H, D)).transpose(1, 2)


def _fake(x, positions, base, rotary_dim):
    return _empty_transposed(x)


def _case(B, H, T, D, *, rotary_dim=None, batched=False, start=0, base=10000.0):
    def make(generator):
        positions = torch.arange(start, start + T)
        if batched:
            positions = positions + torch.arange(B)[:, None] * 3
        x = torch.randn(B, H, T, D, generator=generator, dtype=torch.float64)
        return {"x": x, "positions": positions, "base": base, "rotary_dim": rotary_dim}

    return make


def _bad(name, match, error=ValueError, **changed):
    good = {"x": torch.ones(2, 4, 3, 8), "positions": torch.arange(3)}
    return BadCase(name, lambda: {**good, **changed}, error, match)


def _bench(B, H, T, D):
    elements = 2 * B * H * T * D  # x in, y out
    return BenchCase(
        f"{B}x{H}x{T}x{D}",
        _case(B, H, T, D),
        bytes_per_element=elements,
        backward_bytes_per_element=elements,
    )


OP = Op(
    name="rotary",
    function=rotary,
    reference=rotary_reference,
    torch_peer=rotary_reference,  # torch has no rotary; its users write these lines
    schemas={
        "fwd": "(Tensor x, Tensor positions, float base, int rotary_dim) -> Tensor",
        "bwd": "(Tensor dy, Tensor positions, float base, int rotary_dim) -> Tensor",
    },
    fakes={"fwd": _fake, "bwd": _fake},
    backends={
        "reference": Backend(kernels={"fwd": _reference_fwd, "bwd": _reference_bwd}, devices=("cpu", "cuda")),
        "cpu": Backend(
            kernels={s: _extension.cpu_kernel(f"rotary_{s}") for s in ("fwd", "bwd")},
            devices=("cpu",),
            missing=lambda: _extension.why_missing("rotary_fwd", "rotary_bwd"),
        ),
        "triton": Backend(
            kernels={s: _triton.launcher("rotary", f"launch_rotary_{s}") for s in ("fwd", "bwd")},
            devices=("cuda", "cpu"),
            missing=_triton.missing,
            refuses={s: lambda x, *_: _triton.refuses_tensor(x) for s in ("fwd", "bwd")},
        ),
    },
    cases=(
        Case("tiny", _case(2, 2, 3, 4), gradcheck=True),
        Case("tiny_partial", _case(1, 2, 3, 8, rotary_dim=4, batched=True), gradcheck=True),
        Case("one_token", _case(1, 1, 1, 2)),
        Case("nothing_turned", _case(1, 2, 3, 4, rotary_dim=0)),
        Case("no_tokens", _case(1, 2, 0, 4)),
        Case("batched", _case(3, 2, 37, 64, batched=True)),
        Case("partial", _case(2, 3, 17, 80, rotary_dim=32)),
        Case("odd_half", _case(1, 3, 5, 38, batched=True)),
        Case("far", _case(1, 2, 9, 128, start=100_000, base=500_000.0)),
    ),
    bad_cases=(
        _bad("x_rank", r"x must be \(B, H, T, D\)", x=torch.ones(3, 8)),
        _bad("x_integers", "x must be floating", TypeError, x=torch.ones(2, 4, 3, 8, dtype=torch.int64)),
        _bad("positions_shape", r"positions must be \(3,\) or \(2, 3\)", positions=torch.arange(4)),
        _bad("positions_dtype", "positions must be torch.int32", TypeError, positions=torch.ones(3)),
        _bad("odd_dim", "rotary_dim must be even", rotary_dim=3),
        _bad("wide_dim", r"in \[0, 8\], got 10", rotary_dim=10),
        _bad("base", "base must be positive", base=0.0),
    ),
    bench_cases=(_bench(16, 6, 256, 64), _bench(1, 12, 1024, 64)),
)
