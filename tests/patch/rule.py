"""How wrong may a module on the ops be: the rule of warploom.ops._accuracy, applied to a whole torch.nn model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from warploom.ops import REGISTRY

Results = dict[str, Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def calls(op: str) -> int:
    """How often the op's forward was called, on any back end."""
    return sum(count for key, count in REGISTRY[op].calls.items() if key.startswith("fwd"))


def check_module(
    found_of: nn.Module,
    model: nn.Module,
    inputs: Sequence[Tensor],
    ops: dict[str, int],
    autocast: bool = False,
    **options: Any,
) -> None:
    """Output and gradients of a module on the ops are those of the plain one; each op in `ops` is called so often, and
    no other. options: what forward is called with, beside the inputs."""

    def evaluate(module: nn.Module, autocast: bool = False) -> Results:
        is_exact = next(module.parameters()).dtype == torch.float64
        leaves = [(x.double() if is_exact else x.clone()).requires_grad_(module.training) for x in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(*leaves, **options)
        y = y[0] if isinstance(y, tuple) else y
        results = {"output": y.detach()}
        if module.training:
            named = {f"d{i}": x for i, x in enumerate(leaves)} | dict(module.named_parameters())
            gradients = torch.autograd.grad(y.double().square().sum(), list(named.values()), allow_unused=True)
            results |= {name: dx for name, dx in zip(named, gradients, strict=True) if dx is not None}
        return results

    before = {op: calls(op) for op in REGISTRY}
    found = evaluate(found_of, autocast)
    assert {op: calls(op) - before[op] for op in REGISTRY if calls(op) > before[op]} == ops
    plain = evaluate(model, autocast)
    assert list(found) == list(plain)
    assert all((found[key].dtype, found[key].shape) == (x.dtype, x.shape) for key, x in plain.items())
    is_16_bit = autocast or inputs[0].dtype == torch.bfloat16
    assert excesses(found, plain, model, evaluate, torch.bfloat16 if is_16_bit else torch.float32) == []


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
