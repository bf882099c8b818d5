"""How wrong may an op be: the one rule for the contract tests and the benches.

Truth is the op's reference in float64, on inputs that the dtype under test holds exactly. The largest and the root mean
square error of every output and gradient must be at most

    2 * (error of torch_peer in the same dtype) + bound,    bound = u * |truth| + |truth disturbed - truth|

with u the unit roundoff of the dtype (2**-24 float32, 2**-11 float16, 2**-8 bfloat16). The factor 2 is FlashAttention's
rule. The bound is what rounding does to any implementation. Its first term is the one rounding of the result itself.
Its second is r roundings of everything that goes in and of everything kept for the backward pass, through the condition
of the problem: each such value x becomes x * (1 + r u e), e either -1 or 1, and the largest of a few draws counts. In
the 16-bit dtypes r = 1: what is stored is rounded once, all else is float32. In float32 itself r = 12, the roundings on
the longest path through an op, which is the gradient of a softmax: product, scale, subtraction of the maximum, base-2
exponential (2), row sum, logarithm (2), subtraction of the log-sum-exp, exponential (2), product.

Without the bound, a peer that is right by luck in a tensor of few elements would forbid any rounding; a fixed tolerance
would forgive bugs where the problem is well conditioned, and forbid rounding where it is not.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from warploom.ops._op import BenchCase, Case, Op

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Deviation:
    """The error of one output or gradient beside what is allowed."""

    result: str
    max_error: float
    max_allowed: float
    rms_error: float
    rms_allowed: float

    @property
    def acceptable(self) -> bool:
        # So written that NaN is not acceptable.
        return self.max_error <= self.max_allowed and self.rms_error <= self.rms_allowed

    @property
    def share(self) -> float:
        """The larger of the two errors as a share of what is allowed: up to 1 where it is acceptable."""
        pairs = ((self.max_error, self.max_allowed), (self.rms_error, self.rms_allowed))
        return max(0.0 if error == 0 else error / allowed if allowed > 0 else math.inf for error, allowed in pairs)

    def __str__(self) -> str:
        return (
            f"{self.result}: max error {self.max_error:.3g} (allowed {self.max_allowed:.3g}), "
            f"rms {self.rms_error:.3g} (allowed {self.rms_allowed:.3g})"
        )


class Trial:
    """One case of an op in one dtype: its inputs, its true results and what error they allow."""

    def __init__(self, op: Op, case: Case | BenchCase, dtype: torch.dtype, *, draws: int | None = None):
        self.op, self.dtype = op, dtype
        self.wide = case.wide
        no_grad = case.no_grad if isinstance(case, Case) else ()
        made = case.make(torch.Generator().manual_seed(0))
        # Float64 tensors with values that the dtype under test holds.
        self.inputs = {name: self._held(name, value) for name, value in made.items()}
        floating = {name: value for name, value in self.inputs.items() if _is_floating(value)}
        self.differentiable = [name for name in floating if name not in no_grad]
        # The fewer the signs, the more draws it takes to come near the worst of them.
        lists = [value for value in self.inputs.values() if isinstance(value, list)]
        elements = sum(value.numel() for value in itertools.chain(floating.values(), *lists))
        self.draws = draws or (8 if elements < 5000 else 2)
        self._output_gradients: dict[tuple[torch.Size, ...], list[Tensor]] = {}

    def output_gradients(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Float64 gradients for these outputs, the same whenever their shapes are; the dtype under test holds them."""
        shapes = tuple(y.shape for y in outputs)
        if shapes not in self._output_gradients:
            generator = torch.Generator().manual_seed(1)
            drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
            self._output_gradients[shapes] = [dy.to(self.dtype).double() for dy in drawn]
        return self._output_gradients[shapes]

    def _held(self, name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [self._held(name, each) for each in value]
        return value.to(self._dtype_of(name, self.dtype)).double() if _is_floating(value) else value

    def _dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(dtype, torch.float32) if name in self.wide else dtype

    def arguments(self) -> dict[str, Any]:
        """The public function's arguments in the dtype under test; those to differentiate ask for a gradient."""
        return self._arguments(self.dtype, layout=lambda tensor: tensor, disturb=lambda tensor: tensor)

    def _arguments(
        self, dtype: torch.dtype, layout: Callable[[Tensor], Tensor], disturb: Callable[[Tensor], Tensor]
    ) -> dict[str, Any]:
        def argument(name: str, value: Any) -> Any:
            if isinstance(value, list):
                return [argument(name, each) for each in value]
            if _is_floating(value):
                value = disturb(value).to(self._dtype_of(name, dtype))
            if isinstance(value, Tensor):
                value = layout(value.clone())
            return value.requires_grad_() if name in self.differentiable else value

        return {name: argument(name, value) for name, value in self.inputs.items()}

    def evaluate(
        self,
        function: Callable[..., Any],
        dtype: torch.dtype | None = None,
        *,
        layout: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        disturb: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> Results:
        """Outputs and gradients of the function, by name, in the dtype (default: the one under test); of an op that
        mutates arguments, those arguments after the call.

        layout rewrites every tensor that goes in, output gradients too, to one of equal values and other strides;
        disturb changes the floating ones, given in float64.
        """
        arguments = self._arguments(dtype or self.dtype, layout, disturb)
        returned = function(**arguments)
        if self.op.mutates:
            return {f"{name}[{i}]": value for name in self.op.mutates for i, value in enumerate(arguments[name])}
        outputs = as_tuple(returned)
        results = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
        if self.differentiable:
            gradients = torch.autograd.grad(
                outputs,
                [arguments[name] for name in self.differentiable],
                [
                    layout(disturb(dy).to(y, copy=True))  # a copy, for an op may write into what it is given
                    for dy, y in zip(self.output_gradients(outputs), outputs, strict=True)
                ],
            )
            results |= {f"d{name}": dx for name, dx in zip(self.differentiable, gradients, strict=True)}
        return results

    @cached_property
    def truth(self) -> Results:
        return self.evaluate(self.op.reference, torch.float64)

    @cached_property
    def peer(self) -> Results:
        return self.evaluate(self.op.torch_peer)

    @cached_property
    def allowed(self) -> dict[str, tuple[float, float]]:
        """Largest and root mean square error allowed, per result."""
        u = torch.finfo(self.dtype).eps / 2
        r = 1 if torch.finfo(self.dtype).bits == 16 else 12
        peer = _errors(self.peer, self.truth)
        generator = torch.Generator().manual_seed(2)

        def rounded(value: Tensor) -> Tensor:
            if not value.is_floating_point():
                return value
            draw = torch.randint(2, value.shape, generator=generator, dtype=torch.float64)
            return value * draw.mul_(2 * r * u).add_(1 - r * u)

        with torch.autograd.graph.saved_tensors_hooks(rounded, lambda saved: saved):
            disturbed = [self.evaluate(self.op.reference, torch.float64, disturb=rounded) for _ in range(self.draws)]
        spread = [_errors(results, self.truth) for results in disturbed]
        allowed = {}
        for name, true in self.truth.items():
            size = _max_and_rms(true)
            # A peer that is itself NaN (SDPA on rows that see nothing) excuses nothing.
            of_peer = [2 * error if error < float("inf") else 0.0 for error in peer[name]]
            largest, rms = (of_peer[i] + u * size[i] + max(draw[name][i] for draw in spread) for i in range(2))
            allowed[name] = largest, rms
        return allowed

    def deviations(self, results: Results) -> list[Deviation]:
        errors = _errors(results, self.truth)
        return [
            Deviation(name, errors[name][0], self.allowed[name][0], errors[name][1], self.allowed[name][1])
            for name in self.truth
        ]


def _errors(results: Results, truth: Results) -> dict[str, tuple[float, float]]:
    return {name: _max_and_rms(results[name].double() - true) for name, true in truth.items()}


def _max_and_rms(tensor: Tensor) -> tuple[float, float]:
    if tensor.numel() == 0:
        return 0.0, 0.0
    return tensor.abs().max().item(), tensor.square().mean().sqrt().item()


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
