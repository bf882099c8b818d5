"""AdamW over many tensors in one launch, which also writes the bfloat16 copies that products read of the weights. The
launcher takes the arguments of the operator warploom::adamw_step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from warploom_kernels._launch import Config, launch
from warploom_kernels._tensor_lists import PIECE, load_address, load_size, tables


@triton.jit
def adamw_kernel(
    addresses,  # (7, n) int64: of params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, copies
    sizes,  # (n,) int64: elements
    pieces,  # (programs, 2) int32: which tensor, which piece of it
    n,
    param,  # a tensor of each list, for its type alone
    grad,
    max_exp_avg_sq,  # or None: without AMSGrad
    step,
    lr,
    log2_beta1,
    one_minus_beta1,
    beta2,
    log2_beta2,
    one_minus_beta2,
    decay,  # 1 - lr * weight_decay
    eps,
    grad_factor,
    CLEAR: tl.constexpr,
    COPY: tl.constexpr,  # to bfloat16, of the parameters that have an address for it
    EVEN: tl.constexpr,  # Tables.is_even
    PIECE: tl.constexpr,
):
    PARAM = tl.pointer_type(param.dtype.element_ty)
    tensor = tl.load(pieces + 2 * tl.program_id(0)).to(tl.int64)
    index = tl.load(pieces + 2 * tl.program_id(0) + 1).to(tl.int64) * PIECE + tl.arange(0, PIECE)
    inside = index < load_size(sizes + tensor, EVEN)
    params = load_address(addresses + tensor, PARAM, EVEN) + index
    grads = load_address(addresses + n + tensor, tl.pointer_type(grad.dtype.element_ty), EVEN) + index
    exp_avgs = load_address(addresses + 2 * n + tensor, PARAM, EVEN) + index
    exp_avg_sqs = load_address(addresses + 3 * n + tensor, PARAM, EVEN) + index
    # In float64: 1 - beta^step cancels at the first steps.
    count = tl.load(tl.load(addresses + 5 * n + tensor).to(tl.pointer_type(step.dtype.element_ty))).to(tl.float64)
    correction1 = (1.0 - tl.exp2(count * log2_beta1)).to(tl.float32)
    correction2 = (1.0 - tl.exp2(count * log2_beta2)).to(tl.float32)
    g = tl.load(grads, mask=inside, other=0.0).to(tl.float32) * grad_factor
    m = tl.load(exp_avgs, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sqs, mask=inside, other=0.0).to(tl.float32)
    p = tl.load(params, mask=inside, other=0.0).to(tl.float32)
    m += one_minus_beta1 * (g - m)
    v = beta2 * v + one_minus_beta2 * g * g
    tl.store(exp_avgs, m.to(param.dtype.element_ty), mask=inside)
    tl.store(exp_avg_sqs, v.to(param.dtype.element_ty), mask=inside)
    if max_exp_avg_sq is not None:
        largest = load_address(addresses + 4 * n + tensor, PARAM, EVEN) + index
        v = tl.maximum(v, tl.load(largest, mask=inside, other=0.0).to(tl.float32))
        tl.store(largest, v.to(param.dtype.element_ty), mask=inside)
    p = decay * p - (lr / correction1) * (m / (tl.sqrt(v / correction2) + eps))
    tl.store(params, p.to(param.dtype.element_ty), mask=inside)
    if COPY:
        copy = load_address(addresses + 6 * n + tensor, tl.pointer_type(tl.bfloat16), EVEN)
        tl.store(copy + index, p.to(tl.bfloat16), mask=inside & (tl.load(addresses + 6 * n + tensor) != 0))
    if CLEAR:
        tl.store(grads, tl.zeros((PIECE,), dtype=grad.dtype.element_ty), mask=inside)


# Launcher.


def _flat(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors as they are where their elements lie as densely as, and in the order of, those of `like`."""
    return [
        t if t.stride() == p.stride() and _is_dense(p) else t.contiguous() for t, p in zip(tensors, like, strict=True)
    ]


def _is_dense(tensor: Tensor) -> bool:
    return torch.ops.aten.is_non_overlapping_and_dense.default(tensor)


def launch_adamw_step(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor], state_steps: list[Tensor], packed: list[Tensor],
    lr: float, beta1: float, beta2: float, weight_decay: float, eps: float, maximize: bool, grad_factor: float,
    clear_grads: bool,
) -> None:  # fmt: skip
    torch._foreach_add_(state_steps, 1)
    given = [params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs]
    like = [
        p if all(t.stride() == p.stride() for t in (g, m, v)) and _is_dense(p) else p.contiguous()
        for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)
    ]
    lists = [like, *(_flat(tensors, like) if tensors else [] for tensors in given[1:])]
    table = tables([*lists, state_steps, packed])
    if len(table.pieces):
        launch(
            adamw_kernel,
            lambda _: (len(table.pieces),),
            {
                **table.arguments,
                "n": len(params),
                "param": params[0],
                "grad": grads[0],
                "max_exp_avg_sq": max_exp_avg_sqs[0] if max_exp_avg_sqs else None,
                "step": state_steps[0],
                "lr": lr,
                "log2_beta1": math.log2(beta1) if beta1 else -math.inf,
                "one_minus_beta1": 1 - beta1,
                "beta2": beta2,
                "log2_beta2": math.log2(beta2) if beta2 else -math.inf,
                "one_minus_beta2": 1 - beta2,
                "decay": 1 - lr * weight_decay,
                "eps": eps,
                "grad_factor": -grad_factor if maximize else grad_factor,
                "CLEAR": clear_grads,
                "COPY": any(copy.numel() for copy in packed),
            },
            [Config({"PIECE": PIECE}, num_warps=8)],
        )
    written = [params, *([grads] if clear_grads else []), exp_avgs, exp_avg_sqs, max_exp_avg_sqs]
    used = [lists[0], *([lists[1]] if clear_grads else []), *lists[2:]]
    for originals, tensors in zip(written, used, strict=True):
        for original, tensor in zip(originals, tensors, strict=True):
            if tensor is not original:
                original.copy_(tensor)
