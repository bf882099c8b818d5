"""How wrong may a patched model be: the rule of warploom.ops._accuracy, applied to a whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

Results = dict[str, Tensor]


def excesses(
    found: Results, plain: Results, model: nn.Module, evaluate: Callable[[nn.Module], Results], dtype: torch.dtype
) -> list[str]:
    """What is wrong by more than is allowed, for results of a patched and of the plain model in this dtype.

    Truth is the plain model in float64. Allowed is twice the error of the plain model, plus what rounding does to any
    implementation: one rounding of the result, and r roundings of every parameter and of everything kept for the
    backward pass, r = 1 in bf16 and 12 in float32.
    """
    u, r = torch.finfo(dtype).eps / 2, 1 if dtype == torch.bfloat16 else 12
    exact = copy.deepcopy(model).double()
    truth = evaluate(exact)
    generator = torch.Generator().manual_seed(2)

    def rounded(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        return value * (1 + r * u * (torch.randint(2, value.shape, generator=generator) * 2 - 1))

    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(rounded(parameter))
    with torch.autograd.graph.saved_tensors_hooks(rounded, lambda saved: saved):
        disturbed = evaluate(exact)
    wrong = []
    for name, true in truth.items():
        for measure in (_largest, _root_mean_square):
            error, of_plain, of_rounding = (
                measure(results[name].double() - true) for results in (found, plain, disturbed)
            )
            allowed = 2 * of_plain + u * measure(true) + of_rounding
            if not error <= allowed:  # so written that NaN is wrong
                wrong.append(f"{name}: error {error:.3g}, allowed {allowed:.3g}")
    return wrong


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
