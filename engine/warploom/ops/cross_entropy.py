"""-log softmax(logits)[target], with the gradient made in the forward pass: for logits that exist anyway, where
linear_cross_entropy would make them a second time.

Rows are taken one by one, in torch's operators in chunks, that stay in the cache. torch reads and writes the whole of
float32 logits about eight times, and returns each of those blocks to the system.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from warploom.ops import _extension, _triton
from warploom.ops._op import Backend, BadCase, BenchCase, Case, Op

# float32 logits held at a time: 4 MiB, but at least 16 rows, so that threads have something to share.
CHUNK_ELEMENTS = 1 << 20
CHUNK_ROWS = 16


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
    inplace: bool = False,
) -> Tensor:
    """Return the mean (or sum) of -log softmax(logits)[target] in nats: a float32 scalar.

    logits: (..., V), any floating dtype; targets: (...) int64, in [0, V) or ignore_index. Rows whose target is
    ignore_index count neither in the sum nor in the mean; if all are ignored the sum is 0, the mean NaN, and the
    gradient zero, as in torch. All sums are float32; float64 in, float64 out. The gradient has logits' dtype.
    inplace: logits' own memory becomes the gradient's, in the forward pass and if a gradient is wanted, so that no
    second block of their size is needed. Nothing may read logits after that; autograd refuses the backward pass of an
    operator that saved them, and a second one through this loss if the first had to scale the gradient.
    Raises ValueError for a wrong shape, reduction or target (targets are read on the CPU only), TypeError for a wrong
    dtype.
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be (..., V) with V at least 1, got {tuple(logits.shape)}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be torch.int64, got {targets.dtype}")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"targets must be {tuple(logits.shape[:-1])} to match logits, got {tuple(targets.shape)}")
    if targets.device != logits.device:
        raise ValueError(f"targets must be on {logits.device} as logits is, got {targets.device}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    need_dlogits = torch.is_grad_enabled() and logits.requires_grad
    return _CrossEntropy.apply(logits, targets, ignore_index, reduction == "mean", need_dlogits, inplace)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, ignore_index, mean, need_dlogits, inplace):
        ops = torch.ops.warploom
        ctx.inplace = inplace
        if need_dlogits and inplace:
            loss = ops.cross_entropy_fwd_inplace.default(logits, targets, ignore_index, mean)
            torch.autograd.graph.increment_version(logits)
            dlogits = logits.detach()
        else:
            loss, dlogits = ops.cross_entropy_fwd.default(logits, targets, ignore_index, mean, need_dlogits)
        ctx.save_for_backward(dlogits)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        (dlogits,) = ctx.saved_tensors
        # 1 is what loss.backward() hands over: one pass over memory less. Traced code knows no values.
        if torch.compiler.is_compiling() or dloss.device.type != "cpu" or dloss.item() != 1:
            dlogits = dlogits.mul_(dloss) if ctx.inplace else dlogits * dloss
        return dlogits, None, None, None, None, None


def cross_entropy_reference(logits, targets, ignore_index=-100, reduction="mean", inplace=False):
    rows = logits.reshape(-1, logits.shape[-1])
    wide = rows if rows.dtype == torch.float64 else rows.float()
    return F.cross_entropy(wide, targets.reshape(-1), ignore_index=ignore_index, reduction=reduction)


def _check_values(logits, targets, ignore_index, *_):
    V = logits.shape[-1]
    wrong = ((targets < 0) | (targets >= V)) & (targets != ignore_index)
    if wrong.any():
        value = int(targets[wrong][0])
        raise ValueError(f"targets must be in [0, {V}) or ignore_index {ignore_index}, got {value}")


def _reference_fwd(logits, targets, ignore_index, mean, need_dlogits):
    V = logits.shape[-1]
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    kept = (targets != ignore_index).reshape(-1, 1)  # (N, 1)
    targets = targets.reshape(-1, 1).where(kept, 0)
    rows = logits.reshape(-1, V)
    N = rows.shape[0]
    chunk = max(min(N, max(CHUNK_ELEMENTS // V, CHUNK_ROWS)), 1)
    count = kept.sum().to(wide)
    # Applied here, dlogits is rounded once. The clamp keeps the zero gradient of a batch with nothing to predict.
    scale = count.clamp(min=1).reciprocal() if mean else torch.ones_like(count)

    buffer = rows.new_empty((chunk, V), dtype=wide)
    loss = torch.zeros_like(count)
    dlogits = rows.new_empty((N, V) if need_dlogits else 0)
    for start in range(0, N, chunk):
        part = slice(start, min(start + chunk, N))
        log_p = buffer[: part.stop - part.start]
        torch.log_softmax(log_p.copy_(rows[part]), 1, out=log_p)
        loss -= log_p.gather(1, targets[part]).where(kept[part], 0.0).sum()
        if need_dlogits:
            p = log_p.exp_()
            p.scatter_add_(1, targets[part], p.new_full((p.shape[0], 1), -1.0))
            torch.mul(p, scale, out=p)
            dlogits[part] = p
    if need_dlogits:
        dlogits.index_fill_(0, (~kept[:, 0]).nonzero()[:, 0], 0.0)
        dlogits = dlogits.view(logits.shape)
    return loss / count if mean else loss, dlogits


def _reference_fwd_inplace(logits, targets, ignore_index, mean):
    loss, dlogits = _reference_fwd(logits, targets, ignore_index, mean, True)
    logits.copy_(dlogits)
    return loss


def _fake_fwd(logits, targets, ignore_index, mean, need_dlogits):
    return _fake_fwd_inplace(logits), logits.new_empty(logits.shape if need_dlogits else 0)


def _fake_fwd_inplace(logits, *_):
    return logits.new_empty((), dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)


def _case(*leading, V, ignored=(), spread=1.0, shift=0.0, **options):
    def make(generator):
        logits = spread * torch.randn(*leading, V, generator=generator, dtype=torch.float64) + shift
        targets = torch.randint(V, leading, generator=generator)
        targets.view(-1)[list(ignored)] = -100
        return {"logits": logits, "targets": targets, **options}

    return make


def _bad(name, match, error=ValueError, **changed):
    good = {"logits": torch.ones(2, 3, 5), "targets": torch.zeros(2, 3, dtype=torch.int64)}
    return BadCase(name, lambda: {**good, **changed}, error, match)


_SCHEMAS = {
    "fwd": "(Tensor logits, Tensor targets, int ignore_index, bool mean, bool need_dlogits) -> (Tensor, Tensor)",
    "fwd_inplace": "(Tensor(a!) logits, Tensor targets, int ignore_index, bool mean) -> Tensor",
}

OP = Op(
    name="cross_entropy",
    function=cross_entropy,
    reference=cross_entropy_reference,
    torch_peer=cross_entropy_reference,
    schemas=_SCHEMAS,
    fakes={"fwd": _fake_fwd, "fwd_inplace": _fake_fwd_inplace},
    checks={"fwd": _check_values, "fwd_inplace": _check_values},
    backends={
        "reference": Backend(
            kernels={"fwd": _reference_fwd, "fwd_inplace": _reference_fwd_inplace}, devices=("cpu", "cuda")
        ),
        "cpu": Backend(
            kernels={s: _extension.cpu_kernel(f"cross_entropy_{s}") for s in _SCHEMAS},
            devices=("cpu",),
            missing=lambda: _extension.why_missing("cross_entropy_fwd", "cross_entropy_fwd_inplace"),
        ),
        "triton": Backend(
            kernels={s: _triton.launcher("cross_entropy", f"launch_cross_entropy_{s}") for s in _SCHEMAS},
            devices=("cuda", "cpu"),
            missing=_triton.missing,
            refuses={s: lambda logits, *_: _triton.refuses_tensor(logits) for s in _SCHEMAS},
        ),
    },
    cases=(
        Case("tiny", _case(2, 3, V=5), gradcheck=True),
        Case("tiny_ignored", _case(2, 3, V=5, ignored=(0, 4)), gradcheck=True),
        Case("tiny_sum", _case(4, V=5, reduction="sum"), gradcheck=True),
        Case("one_class", _case(3, V=1)),
        Case("no_rows", _case(0, V=4, reduction="sum")),
        Case("all_ignored", _case(3, V=4, reduction="sum", ignored=(0, 1, 2))),
        *(Case(f"{N}x{V}", _case(N, V=V, ignored=(1,))) for N, V in ((7, 65), (33, 257), (130, 1000))),
        Case("two_chunks", _case(36, V=30000, ignored=(3,))),
        Case("large_logits", _case(9, V=100, spread=100.0)),
        Case("far_below_zero", _case(9, V=100, shift=-1000.0)),
        Case("in_place", _case(33, V=257, ignored=(1,), inplace=True)),
    ),
    bad_cases=(
        _bad("targets_shape", r"targets must be \(2, 3\)", targets=torch.zeros(6, dtype=torch.int64)),
        _bad("targets_dtype", "targets must be torch.int64", TypeError, targets=torch.zeros(2, 3)),
        _bad("targets_range", r"targets must be in \[0, 5\)", targets=torch.full((2, 3), 5)),
        _bad("reduction", "reduction must be", reduction="none"),
        _bad("integers", "logits must be floating", TypeError, logits=torch.ones(2, 3, 5, dtype=torch.int64)),
    ),
    bench_cases=tuple(
        BenchCase(
            f"{N}x{V}" + (" in place" if inplace else ""),
            _case(N, V=V, inplace=inplace),
            bytes_per_element=N * V,
            backward_bytes_per_element=N * V,
            backward_in_forward=True,
        )
        for N, V, inplace in ((2048, 8192, True), (2048, 8192, False), (1024, 50304, False))
    ),
)
