"""Linear layers, and those that take in the activation behind them: ops.linear.

plan_linear is the entry for every dense layer, plan_pair for a dense layer and the activation behind it.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from warploom.nn.autocast import dense
from warploom.patch.swap import Plan, Swap


def op_activation(activation: object) -> str | None:
    """Return ops.linear's name of an activation module or function, None for those it does not know."""
    if activation in (F.relu, torch.relu):
        return "relu"
    if activation is F.silu:
        return "silu"
    if activation is F.gelu:
        return "gelu"
    if not isinstance(activation, nn.Module):
        return None
    if type(activation) is nn.GELU:
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(type(activation).__name__)


# By the names of classes: the same ones in torch.nn and in transformers.activations.
_ACTIVATIONS = {
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
}


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at what goes in or out of the module, which then must be computed on its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


class LinearSwap(Swap):
    """torch.nn.Linear."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        return dense(input, self.weight, self.bias)


class Conv1DSwap(Swap):
    """transformers' Conv1D, a Linear whose weight is (C, F)."""

    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return dense(x, self.weight.t(), self.bias)


class ActivatedLinear(Swap):
    """A Linear or Conv1D (a Linear with transposed weight) that has taken in the activation behind it, whose module
    becomes PassThrough."""

    is_original = False
    activation: str
    transposed: bool
    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        return dense(input, self.weight.t() if self.transposed else self.weight, self.bias, self.activation)

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, activation={self.activation}"


class PassThrough(Swap):
    """An activation that the Linear in front of it has taken in."""

    is_original = False

    def forward(self, input: Tensor) -> Tensor:
        return input


def plan_pair(plan: Plan, path: str, parent: nn.Module, linear_name: str, activation_name: str) -> None:
    """Plan to fuse two children of a module whose forward applies one to what the other returns, and nothing else."""
    linear, activation = getattr(parent, linear_name), getattr(parent, activation_name)
    linear_path = f"{path}.{linear_name}".lstrip(".")
    if not (plan.undecided(linear) and is_linear(linear) and plan.undecided(activation)):
        return
    name, kind = op_activation(activation), "linear + activation"
    if name is None:
        plan.leave(linear_path, activation, kind, f"no kernel has {type(activation).__name__} in it")
    elif plan.is_shared(linear) or plan.is_shared(activation):
        plan.leave(linear_path, activation, kind, "one of the two stands in several places of the model")
    elif has_hooks(linear) or has_hooks(activation):
        plan.leave(linear_path, activation, kind, "a hook looks at what goes between them")
    else:
        transposed = is_conv1d(linear)
        if plan.swap(linear_path, linear, ActivatedLinear, f"linear + {name}", activation=name, transposed=transposed):
            plan.swap_quietly(activation, PassThrough)


def plan_linear(plan: Plan, path: str, module: nn.Module) -> None:
    """Plan to swap a Linear that no other rule has taken."""
    if type(module).forward is nn.Linear.forward:
        plan.swap(path, module, LinearSwap, "linear")
    elif is_conv1d(module):
        plan.swap(path, module, Conv1DSwap, "linear")


def is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
