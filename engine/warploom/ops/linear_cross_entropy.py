"""Cross-entropy of hidden weight^T against target classes, without ever holding the (N, V) logits.

There are two ways to the gradients. In the forward pass, while a chunk of logits is there (Liger-Kernel's fused linear
cross-entropy, 2024): no product is made twice, but dweight, V x C, is read and written for every chunk of rows. Or in
the backward pass, from each row's log-sum-exp and logits made again, some words at a time, as flash attention does:
dweight is then written once. The second is taken where products are cheap: for 16-bit hidden states on a GPU and on
processors with a matrix unit. In float32 on a CPU the first leaves the products to torch, and a chunk's softmax, loss
and gradient to cross_entropy's kernel where there is one.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from warploom.ops import _extension, _triton
from warploom.ops._op import Backend, BadCase, BenchCase, Case, Op

# Rows of logits held at a time: as many as make CHUNK_ELEMENTS (16 MiB of float32), but at least CHUNK_ROWS. Each chunk
# reads and writes all of dweight, V x C, beside a few passes over its own rows x V logits, so few rows of a large
# vocabulary lose. CPU seconds of 1024 x 768 x 50304, one core of a Sapphire Rapids, fp32 / bf16: 83 rows 2.3 / 2.2,
# 256 rows 1.57 / 1.04, 512 rows 1.54 / 0.85, whole logits 1.78 / 0.84.
CHUNK_ELEMENTS = 1 << 22
CHUNK_ROWS = 512


class ClassShard(Protocol):
    """Where the classes of a weight lie among all classes, the rest being on other processes."""

    first: int
    """The class of the weight's first row."""

    def combined_lse(self, lse: Tensor) -> Tensor:
        """Return each row's log-sum-exp over all classes, (N,), from those over the classes of every shard."""

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of a scalar over the shards."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
    *,
    shard: ClassShard | None = None,
) -> Tensor:
    """Return the mean (or sum) of -log softmax(hidden weight^T)[target] in nats: a float32 scalar.

    hidden: (..., C); weight: (V, C), of hidden's dtype or float32; targets: (...) int64, in [0, V) or ignore_index.
    Rows whose target is ignore_index count neither in the sum nor in the mean; if all are ignored the sum is 0, the
    mean NaN, and the gradients zero, as in torch. float64 in, float64 out.
    The products run in hidden's dtype (weight is cast to it), so bf16 logits carry bf16's 8 bits, as under torch's
    autocast; all else is float32, and dweight is summed over the chunks in float32 and returned in weight's dtype.
    shard: weight holds some of the classes and each process calls with the same hidden and targets. The loss is then
    that over all classes, on every process, and dhidden is this shard's share of a sum. No logits are exchanged.
    Raises ValueError for a wrong shape, reduction or target (targets are read on the CPU only), TypeError for a wrong
    dtype.
    """
    if not hidden.is_floating_point():
        raise TypeError(f"hidden must be floating point, got {hidden.dtype}")
    if hidden.dim() == 0 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight must be (V, C), V at least 1, to match hidden {tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    if weight.dtype not in (hidden.dtype, torch.float32):
        raise TypeError(f"weight must be {hidden.dtype} as hidden is or torch.float32, got {weight.dtype}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be torch.int64, got {targets.dtype}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets must be {tuple(hidden.shape[:-1])} to match hidden, got {tuple(targets.shape)}")
    for name, tensor in (("weight", weight), ("targets", targets)):
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device} as hidden is, got {tensor.device}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    with_grad = torch.is_grad_enabled()
    needs = with_grad and hidden.requires_grad, with_grad and weight.requires_grad
    if shard is None:
        return _LinearCrossEntropy.apply(hidden, weight, targets, ignore_index, reduction == "mean", *needs)
    return _ShardedLinearCrossEntropy.apply(hidden, weight, targets, ignore_index, reduction == "mean", *needs, shard)


def _recomputes(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the gradients are made in the backward pass, from logits computed again."""
    if hidden.dtype not in (torch.bfloat16, torch.float16):
        return OP.forced() in ("cpu", "triton")
    # A 16-bit dweight cannot take the sums of several chunks, and the reference is no kernel to be fast with.
    early = hidden.device.type == "cpu" and weight.dtype == torch.float32 and OP.forced() in (None, "cpu")
    return not (early and _products_are_dear())


def _products_are_dear() -> bool:
    """Whether 16-bit products take the C++ kernels as long as float32 ones or half as long: no matrix unit."""
    return _extension.why_missing("linear_cross_entropy_fwd") is None and _extension.level() != "amx"


# What torch.compiler.assume_constant_result sets: as a decorator it would import torch._dynamo, 160 MB, at once.
_products_are_dear._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, ignore_index, mean, need_dhidden, need_dweight):
        ctx.recompute = _recomputes(hidden, weight)
        ctx.ignore_index, ctx.mean, ctx.needs = ignore_index, mean, (need_dhidden, need_dweight)
        loss, count, lse, *gradients = torch.ops.warploom.linear_cross_entropy_fwd.default(
            hidden, weight, targets, ignore_index, *((False, False) if ctx.recompute else ctx.needs)
        )
        # The gradients are no saved tensors, so that the backward pass may scale them where they are: dweight is the
        # largest tensor of all. It takes them with it; a second one has them made again.
        ctx.gradients = None if ctx.recompute else gradients
        ctx.save_for_backward(count, hidden, weight, targets, lse)
        return loss / count if mean else loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        count, hidden, weight, targets, lse = ctx.saved_tensors
        # The clamp keeps the zero gradients of a batch with nothing to predict: 0 / 0 would make them NaN.
        scale = dloss / count.clamp(min=1) if ctx.mean else dloss
        inputs = hidden, weight, targets
        if ctx.recompute:
            gradients = torch.ops.warploom.linear_cross_entropy_bwd.default(
                scale, *inputs, lse, ctx.ignore_index, *ctx.needs
            )
        else:
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:
                *_, dhidden, dweight = torch.ops.warploom.linear_cross_entropy_fwd.default(
                    *inputs, ctx.ignore_index, *ctx.needs
                )
                gradients = dhidden, dweight
            for gradient in gradients:
                gradient.mul_(scale)
        dhidden, dweight = (gradient if need else None for gradient, need in zip(gradients, ctx.needs, strict=True))
        return dhidden, dweight, *(None,) * 5


class _ShardedLinearCrossEntropy(torch.autograd.Function):
    """The way by recomputation: the backward pass needs the log-sum-exp over all classes, known only after the
    forward pass of every shard."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, ignore_index, mean, need_dhidden, need_dweight, shard):
        V = weight.shape[0]
        here = (targets >= shard.first) & (targets < shard.first + V)
        local = torch.where(here, targets - shard.first, V)
        local = local.where(targets != ignore_index, ignore_index)
        loss, count, lse, *_ = torch.ops.warploom.linear_cross_entropy_fwd.default(
            hidden, weight, local, ignore_index, False, False, True
        )
        kept = (local != ignore_index).reshape(-1)
        # The op's loss is lse - target logit, with logit 0 for targets of other shards.
        target_logits = lse.double().where(kept, 0.0).sum() - loss.double()
        lse = shard.combined_lse(lse)
        total = (lse.double().where(kept, 0.0).sum() - shard.total(target_logits)).to(loss.dtype)
        ctx.save_for_backward(count, hidden, weight, local, lse)
        ctx.ignore_index, ctx.mean, ctx.needs = ignore_index, mean, (need_dhidden, need_dweight)
        return total / count if mean else total

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        count, *saved = ctx.saved_tensors
        scale = dloss / count.clamp(min=1) if ctx.mean else dloss
        gradients = torch.ops.warploom.linear_cross_entropy_bwd.default(
            scale, *saved, ctx.ignore_index, *ctx.needs, True
        )
        dhidden, dweight = (gradient if need else None for gradient, need in zip(gradients, ctx.needs, strict=True))
        return dhidden, dweight, *(None,) * 6


def linear_cross_entropy_reference(hidden, weight, targets, ignore_index=-100, reduction="mean"):
    logits = F.linear(hidden, weight.to(hidden.dtype)).reshape(-1, weight.shape[0])
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, targets.reshape(-1), ignore_index=ignore_index, reduction=reduction)


def _check_values(hidden, weight, targets, ignore_index, need_dhidden, need_dweight, sharded=False):
    V = weight.shape[0]
    wrong = ((targets < 0) | (targets >= V + sharded)) & (targets != ignore_index)
    if wrong.any():
        value = int(targets[wrong][0])
        raise ValueError(f"targets must be in [0, {V}) or ignore_index {ignore_index}, got {value}")


def _reference_fwd(hidden, weight, targets, ignore_index, need_dhidden, need_dweight, sharded=False):
    loss, count, lse, *gradients = _reference_pass(
        hidden, weight, targets, None, ignore_index, need_dhidden, need_dweight
    )
    # Saved for a backward pass that makes the gradients, and only then returned.
    return loss, count, lse.new_empty(0) if need_dhidden or need_dweight else lse, *gradients


def _reference_bwd(scale, hidden, weight, targets, lse, ignore_index, need_dhidden, need_dweight, sharded=False):
    *_, dhidden, dweight = _reference_pass(hidden, weight, targets, lse, ignore_index, need_dhidden, need_dweight)
    return dhidden * scale.to(dhidden.dtype), dweight * scale.to(dweight.dtype)


def _reference_pass(hidden, weight, targets, lse, ignore_index, need_dhidden, need_dweight):
    """lse: (N,), or None to have it made of these logits. A target of V is a class of another shard: its logit counts
    as 0, and no probability is lowered by 1 for it.
    The gradients of the sum are made here, while a chunk's logits are there: computing them again in the backward
    would cost a third more products, and without kernels of one's own the products are all of the cost."""
    V, C = weight.shape
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    kept = (targets != ignore_index).reshape(-1, 1)  # (N, 1)
    here = kept & (targets.reshape(-1, 1) != V)
    targets = targets.reshape(-1, 1).where(here, 0)
    # With hidden zero, an ignored row adds nothing to dweight, at the cost of a pass over C columns instead of V.
    x = hidden.reshape(-1, C).where(kept, 0.0)
    w = weight.to(hidden.dtype)
    N = x.shape[0]
    chunk = min(N, max(CHUNK_ELEMENTS // V, CHUNK_ROWS))

    products = x.new_empty(chunk, V)
    buffer = products if hidden.dtype == wide else products.to(wide)
    loss = torch.zeros((), dtype=wide, device=x.device)
    make_lse = lse is None
    lse = loss.new_empty(N) if make_lse else lse
    dhidden = x.new_empty((N, C) if need_dhidden else 0)
    dweight = torch.zeros((V, C) if need_dweight else 0, dtype=wide, device=x.device)
    partial = torch.empty_like(w) if need_dweight and hidden.dtype != wide else None
    for start in range(0, N, max(chunk, 1)):
        rows = slice(start, min(start + chunk, N))
        n = rows.stop - rows.start
        logits = torch.mm(x[rows], w.mT, out=products[:n])  # (n, V)
        if logits.dtype != wide:
            logits = buffer[:n].copy_(logits)
        if make_lse:
            torch.logsumexp(logits, 1, out=lse[rows])
        log_p = logits.sub_(lse[rows, None])
        loss -= log_p.gather(1, targets[rows]).where(here[rows], -lse[rows, None]).where(kept[rows], 0.0).sum()
        if not (need_dhidden or need_dweight):
            continue
        dlogits = log_p.exp_()
        dlogits.scatter_add_(1, targets[rows], -here[rows].to(dlogits.dtype))
        if dlogits.dtype != x.dtype:
            dlogits = products[:n].copy_(dlogits)
        if need_dhidden:
            torch.mm(dlogits, w, out=dhidden[rows]).mul_(kept[rows])
        if partial is not None:
            # A product in hidden's dtype is rounded to it; adding the chunks up in it would round once more per chunk.
            dweight += torch.mm(dlogits.mT, x[rows], out=partial)
        elif need_dweight:
            dweight.addmm_(dlogits.mT, x[rows])
    dhidden = dhidden.view(hidden.shape) if need_dhidden else dhidden
    return loss, kept.sum().to(wide), lse, dhidden, dweight.to(weight.dtype)


_cpu_fwd = _extension.cpu_kernel("linear_cross_entropy_fwd")
_cpu_cross_entropy = _extension.cpu_kernel("cross_entropy_fwd_inplace")


def _cpu_forward(hidden, weight, targets, ignore_index, need_dhidden, need_dweight, sharded=False):
    if not (need_dhidden or need_dweight) or hidden.dtype in (torch.bfloat16, torch.float16):
        return _cpu_fwd(hidden, weight, targets, ignore_index, need_dhidden, need_dweight, sharded)
    V, C = weight.shape
    targets = targets.reshape(-1)
    kept = (targets != ignore_index).reshape(-1, 1)  # (N, 1)
    x = hidden.reshape(-1, C).where(kept, 0.0)  # padding may hold anything, NaN too, which times 0 is NaN
    w = weight.to(hidden.dtype)
    N = x.shape[0]
    chunk = max(min(N, max(CHUNK_ELEMENTS // V, CHUNK_ROWS)), 1)
    logits = x.new_empty(chunk, V)
    loss = torch.zeros((), dtype=torch.float64)
    dhidden = x.new_empty((N, C) if need_dhidden else 0)
    dweight = torch.empty_like(w) if need_dweight else w.new_empty(0)
    if N == 0:
        dweight.zero_()
    for start in range(0, N, chunk):
        rows = slice(start, min(start + chunk, N))
        dlogits = torch.mm(x[rows], w.mT, out=logits[: rows.stop - start])  # (n, V), logits for one line more
        loss += _cpu_cross_entropy(dlogits, targets[rows], ignore_index, False)
        if need_dhidden:
            torch.mm(dlogits, w, out=dhidden[rows])
        if need_dweight:
            dweight.addmm_(dlogits.mT, x[rows], beta=int(start > 0))  # with 0 nothing is read
    dhidden = dhidden.view(hidden.shape) if need_dhidden else dhidden
    return loss.to(x.dtype), kept.sum().to(x.dtype), x.new_empty(0), dhidden, dweight.to(weight.dtype)


def _cpu_refuses(hidden, weight, targets, ignore_index, need_dhidden, need_dweight, sharded=False):
    if hidden.dtype in (torch.float32, torch.float64) or weight.dtype == torch.float32:
        return None
    return _refuses_early_gradients(hidden, weight, targets, ignore_index, need_dhidden, need_dweight, sharded)


def _fake_fwd(hidden, weight, targets, ignore_index, need_dhidden, need_dweight, sharded=False):
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    loss = hidden.new_empty((), dtype=wide)
    lse = loss.new_empty(0 if need_dhidden or need_dweight else targets.numel())
    return loss, torch.empty_like(loss), lse, *_fake_gradients(hidden, weight, need_dhidden, need_dweight)


def _fake_bwd(scale, hidden, weight, targets, lse, ignore_index, need_dhidden, need_dweight, sharded=False):
    return _fake_gradients(hidden, weight, need_dhidden, need_dweight)


def _fake_gradients(hidden, weight, need_dhidden, need_dweight):
    return hidden.new_empty(hidden.shape if need_dhidden else 0), weight.new_empty(weight.shape if need_dweight else 0)


def _refuses_early_gradients(hidden, weight, targets, ignore_index, need_dhidden, need_dweight, sharded=False):
    if need_dhidden or need_dweight:
        return "its gradients are made in the backward pass, and the call wants them in the forward pass"
    return None


def _float32_left_to_cublas(hidden):
    return "cuBLAS is faster in float32" if hidden.dtype == torch.float32 else None


def _case(*leading, C, V, reduction="mean", ignored=(), spread=1.0):
    def make(generator):
        hidden = spread * torch.randn(*leading, C, generator=generator, dtype=torch.float64)
        weight = torch.randn(V, C, generator=generator, dtype=torch.float64) * C**-0.5
        targets = torch.randint(V, leading, generator=generator)
        targets.view(-1)[list(ignored)] = -100
        return {"hidden": hidden, "weight": weight, "targets": targets, "reduction": reduction}

    return make


def _bad(name, match, error=ValueError, **changed):
    good = {"hidden": torch.ones(2, 3, 4), "weight": torch.ones(5, 4), "targets": torch.zeros(2, 3, dtype=torch.int64)}
    return BadCase(name, lambda: {**good, **changed}, error, match)


def _bench(N, C, V):
    return BenchCase(
        f"{N}x{C}x{V}",
        _case(N, C=C, V=V),
        flops=2 * N * C * V,
        backward_flops=4 * N * C * V,
        bytes_per_element=N * C + V * C,
        backward_bytes_per_element=N * C + V * C,
        backward_in_forward=True,
    )


OP = Op(
    name="linear_cross_entropy",
    function=linear_cross_entropy,
    reference=linear_cross_entropy_reference,
    torch_peer=linear_cross_entropy_reference,  # whole logits, as a torch user writes it
    schemas={
        "fwd": "(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, bool need_dhidden, "
        "bool need_dweight, bool sharded=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        "bwd": "(Tensor scale, Tensor hidden, Tensor weight, Tensor targets, Tensor lse, int ignore_index, "
        "bool need_dhidden, bool need_dweight, bool sharded=False) -> (Tensor, Tensor)",
    },
    fakes={"fwd": _fake_fwd, "bwd": _fake_bwd},
    checks={"fwd": _check_values},
    backends={
        "reference": Backend(kernels={"fwd": _reference_fwd, "bwd": _reference_bwd}, devices=("cpu", "cuda")),
        "cpu": Backend(
            kernels={"fwd": _cpu_forward, "bwd": _extension.cpu_kernel("linear_cross_entropy_bwd")},
            devices=("cpu",),
            missing=lambda: _extension.why_missing(
                "linear_cross_entropy_fwd", "linear_cross_entropy_bwd", "cross_entropy_fwd_inplace"
            ),
            refuses={"fwd": _cpu_refuses},
        ),
        "triton": Backend(
            kernels={
                s: _triton.launcher("linear_cross_entropy", f"launch_linear_cross_entropy_{s}") for s in ("fwd", "bwd")
            },
            devices=("cuda", "cpu"),
            missing=_triton.missing,
            refuses={
                "fwd": lambda hidden, *rest: _triton.refuses_product(hidden) or _refuses_early_gradients(hidden, *rest),
                "bwd": lambda scale, hidden, *_: _triton.refuses_product(hidden),
            },
            slower={
                "fwd": lambda hidden, *_: _float32_left_to_cublas(hidden),
                "bwd": lambda scale, hidden, *_: _float32_left_to_cublas(hidden),
            },
        ),
    },
    cases=(
        Case("tiny", _case(2, 3, C=4, V=5), gradcheck=True),
        Case("tiny_sum_ignored", _case(6, C=4, V=5, reduction="sum", ignored=(0, 4)), gradcheck=True),
        Case("tiny_mean_ignored", _case(6, C=4, V=5, ignored=(1, 2, 5)), gradcheck=True),
        Case("one_class", _case(3, C=4, V=1)),
        Case("no_rows_sum", _case(0, C=4, V=5, reduction="sum")),
        Case("all_ignored_sum", _case(2, C=4, V=5, reduction="sum", ignored=(0, 1))),
        Case("batched", _case(3, 17, C=48, V=257, ignored=(2, 50))),
        Case("float32_weight", _case(40, C=48, V=300), dtypes=(torch.bfloat16,), wide=("weight",)),
        Case("float32_weight_several_chunks", _case(520, C=40, V=32800), (torch.bfloat16,), wide=("weight",)),
        Case("several_chunks", _case(520, C=8, V=8200, reduction="sum"), dtypes=(torch.float32, torch.bfloat16)),
        # Logits in the hundreds: probabilities underflow to 0 while the loss must stay finite.
        Case("large_logits", _case(20, C=32, V=64, spread=200.0)),
        Case("one_large_logit", _case(20, C=32, V=1, spread=200.0)),
    ),
    bad_cases=(
        _bad("hidden_integers", "hidden must be floating", TypeError, hidden=torch.ones(2, 3, 4, dtype=torch.int64)),
        _bad("weight_shape", r"weight must be \(V, C\), V at least 1", weight=torch.ones(5, 3)),
        _bad("weight_dtype", "weight must be torch.float32", TypeError, weight=torch.ones(5, 4).half()),
        _bad("targets_shape", r"targets must be \(2, 3\)", targets=torch.zeros(6, dtype=torch.int64)),
        _bad("targets_dtype", "targets must be torch.int64", TypeError, targets=torch.zeros(2, 3)),
        _bad(
            "target_too_large",
            r"targets must be in \[0, 5\) or ignore_index -100, got 7",
            targets=torch.full((2, 3), 7),
        ),
        _bad("target_negative", "got -1", targets=torch.full((2, 3), -1)),
        _bad("reduction", "reduction must be 'mean' or 'sum', got 'none'", reduction="none"),
    ),
    bench_cases=(_bench(4096, 384, 8192), _bench(1024, 768, 50304)),
)
