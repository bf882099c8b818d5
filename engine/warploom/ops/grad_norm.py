"""sqrt(sum of g^2) over all elements of many tensors, in one pass: the norm by which gradients are clipped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from warploom.ops import _extension, _triton
from warploom.ops._op import Backend, BadCase, BenchCase, Case, Op


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of the elements of all tensors together: a float32 scalar, float64 for float64.

    grads: any shapes, one floating dtype; of no tensors the norm is 0. Of tensors on several devices the norm is on
    the first one's. The squares are summed in float64: a norm that float32 holds does not overflow. Raises TypeError
    for a wrong or mixed dtype.
    """
    if not grads:
        return torch.zeros(())
    by_device: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        by_device.setdefault(grad.device, []).append(grad)
    if len(by_device) == 1:
        return torch.ops.warploom.grad_norm_fwd(grads)
    norms = [torch.ops.warploom.grad_norm_fwd(part) for part in by_device.values()]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device).double() for norm in norms])).to(
        norms[0].dtype
    )


def grad_norm_reference(grads):
    return torch.cat([grad.flatten() for grad in grads]).square().sum().sqrt()


def _torch_peer(grads):
    norm = torch.nn.utils.get_total_norm(grads)
    return norm.to(_norm_dtype(norm.dtype))


def _norm_dtype(dtype):
    return torch.promote_types(dtype, torch.float32)


def _check(grads):
    dtype = grads[0].dtype
    if not dtype.is_floating_point:
        raise TypeError(f"grads must be floating point, got {dtype}")
    for i, grad in enumerate(grads):
        if grad.dtype != dtype:
            raise TypeError(f"grads[{i}] must be {dtype} as grads[0] is, got {grad.dtype}")


def _reference_fwd(grads):
    _check(grads)
    norms = torch.stack(torch._foreach_norm(grads, dtype=torch.float64))
    return torch.linalg.vector_norm(norms).to(_norm_dtype(grads[0].dtype))


def _triton_refuses(grads):
    _check(grads)
    return _triton.refuses_tensor(grads[0])


def _fake_fwd(grads):
    return grads[0].new_empty((), dtype=_norm_dtype(grads[0].dtype))


def transformer_shapes(vocab_size: int, d_model: int, d_ff: int, num_layers: int, seq_len: int) -> list[tuple]:
    """The shapes of a transformer's parameters, for benches: two tables, and per layer 4 matrices and 8 vectors."""
    C, F = d_model, d_ff
    layer = [(C,), (C,), (3 * C, C), (3 * C,), (C, C), (C,), (C,), (C,), (F, C), (F,), (C, F), (C,)]
    return [(vocab_size, C), (seq_len, C), *layer * num_layers, (C,), (C,)]


SMALL_SHAPES = transformer_shapes(vocab_size=8192, d_model=384, d_ff=1536, num_layers=6, seq_len=256)  # 13.9 M


def _case(*shapes, scale=1.0):
    def make(generator):
        return {"grads": [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]}

    return make


OP = Op(
    name="grad_norm",
    function=grad_norm,
    reference=grad_norm_reference,
    torch_peer=_torch_peer,
    schemas={"fwd": "(Tensor[] grads) -> Tensor"},
    fakes={"fwd": _fake_fwd},
    backends={
        "reference": Backend(kernels={"fwd": _reference_fwd}, devices=("cpu", "cuda")),
        "cpu": Backend(
            kernels={"fwd": _extension.cpu_kernel("grad_norm_fwd")},
            devices=("cpu",),
            missing=lambda: _extension.why_missing("grad_norm_fwd"),
        ),
        "triton": Backend(
            kernels={"fwd": _triton.launcher("grad_norm", "launch_grad_norm_fwd")},
            devices=("cuda", "cpu"),
            missing=_triton.missing,
            refuses={"fwd": _triton_refuses},
        ),
    },
    cases=(
        Case("one", _case((2, 3))),
        Case("ragged", _case((0,), (), (1,), (7,), (1023,), (5, 205))),
        Case("several_blocks", _case((300, 300), (3,), (70000,))),
        Case("nothing_in_it", _case((0,), (0, 3))),
        # The squares of the elements are beyond float32.
        Case("large", _case((4, 9), scale=1e25), dtypes=(torch.float32, torch.bfloat16)),
    ),
    bad_cases=(
        BadCase("integers", lambda: {"grads": [torch.ones(2, dtype=torch.int64)]}, TypeError, "grads must be floating"),
        BadCase("mixed", lambda: {"grads": [torch.ones(2), torch.ones(2).double()]}, TypeError, r"grads\[1\] must be"),
    ),
    bench_cases=(
        BenchCase(
            "small",
            _case(*SMALL_SHAPES),
            bytes_per_element=sum(torch.Size(shape).numel() for shape in SMALL_SHAPES),
        ),
    ),
    differentiable=False,
)
