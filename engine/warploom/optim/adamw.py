"""torch.optim.AdamW with the step made by warploom.ops.adamw: one pass over all parameters of a group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from warploom.ops import adamw
from warploom.ops.linear import PackedWeight
from warploom.optim.eager import EagerMethods
from warploom.optim.parts import local_part

# Parameters, gradients, exp_avg, exp_avg_sq, max_exp_avg_sq (empty without amsgrad), step.
_Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]

_NOTHING = torch.empty(0, dtype=torch.uint8)


class AdamW(EagerMethods, torch.optim.AdamW):
    """AdamW, in the place of torch's: the same arguments, param_groups, state_dict and, up to rounding, results.

    foreach and fused choose among torch's loops and so change nothing here. Groups with capturable or differentiable,
    and complex parameters, take torch's own step, since those need it made of torch's operators.
    """

    # Of parameters that are packed too. Not copied or pickled with the optimizer: a copy has other parameters.
    _packed: Mapping[Tensor, PackedWeight] = {}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        # With fused, torch's would take GradScaler's factor and verdict into its step. Here they come before it.
        self._step_supports_amp_scaling = False

    def pack_into(self, packed: Mapping[Tensor, PackedWeight]) -> None:
        """Let each step leave new values of these parameters in their packed form too, in the same pass."""
        self._packed = packed

    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        grad_factor: float = 1.0,
        clear_grads: bool = False,
    ) -> float | None:
        """Make one step, as if every gradient were grad_factor times what it is, and return what closure returned.

        The factor of gradient clipping given here costs no pass of its own; the gradients keep their values.
        clear_grads leaves zeros in them, instead of zero_grad() afterwards. Both need parameters that do not take
        torch's own step: ValueError.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for lists in self._lists_of(group).values():
                if group["capturable"] or group["differentiable"] or lists[0][0].is_complex():
                    if grad_factor != 1.0 or clear_grads:
                        raise ValueError(
                            "grad_factor and clear_grads need real parameters without capturable and differentiable"
                        )
                    _torch_step(group, lists)
                    continue
                beta1, beta2 = group["betas"]
                memories = [self._packed_memory(param) for param in lists[0]]
                adamw(
                    *lists,
                    lr=float(group["lr"]),
                    beta1=float(beta1),
                    beta2=float(beta2),
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=group["maximize"],
                    grad_factor=grad_factor,
                    clear_grads=clear_grads,
                    packed=[_NOTHING if memory is None else memory for memory in memories],
                )
                for param, memory in zip(lists[0], memories, strict=True):
                    if memory is not None:
                        self._packed[param].now_hold(param)
        return loss

    def _packed_memory(self, param: Tensor) -> Tensor | None:
        return self._packed[param].memory_for(param) if param in self._packed else None

    def _lists_of(self, group: dict[str, Any]) -> dict[tuple, _Lists]:
        """What has a gradient, by device and dtypes. Built anew at each step, 0.1 ms for 200 parameters: to see that
        nobody put another tensor into a state would take as long."""
        found: dict[tuple, _Lists] = defaultdict(lambda: ([], [], [], [], [], []))
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            if grad.is_sparse:
                raise RuntimeError("AdamW does not support sparse gradients; use torch.optim.SparseAdam")
            state = self.state[param]
            if not state:
                self._start(state, param, group)
            elif param.is_cuda and not state["step"].is_cuda:  # loaded from where it was counted on the CPU
                state["step"] = state["step"].to(param.device)
            params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps = found[param.device, param.dtype, grad.dtype]
            params.append(local_part(param))
            grads.append(local_part(grad))
            exp_avgs.append(state["exp_avg"])
            exp_avg_sqs.append(state["exp_avg_sq"])
            if group["amsgrad"]:
                max_exp_avg_sqs.append(state["max_exp_avg_sq"])
            steps.append(state["step"])
        return found

    @staticmethod
    def _start(state: dict[str, Tensor], param: Tensor, group: dict[str, Any]) -> None:
        # Counted where it is read: on a GPU one kernel makes the step of all parameters.
        device = param.device if group["capturable"] or param.is_cuda else "cpu"
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(local_part(param), memory_format=torch.preserve_format)


def _torch_step(group: dict[str, Any], lists: _Lists) -> None:
    beta1, beta2 = group["betas"]
    with torch.set_grad_enabled(group["differentiable"]):
        torch_adamw(
            *lists,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            amsgrad=group["amsgrad"],
            foreach=group["foreach"],
            capturable=group["capturable"],
            differentiable=group["differentiable"],
            fused=group["fused"],
            has_complex=lists[0][0].is_complex(),
        )
