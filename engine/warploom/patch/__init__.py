"""Put the ops into a model that was written for plain torch or for transformers, and take them out again.

Mechanism: a module whose work an op can do gets another class, a subclass of its own made here, and nothing else about
it changes. So parameters and buffers are the same objects, state_dict has the same keys, hooks stay, deepcopy and
pickle work (swap.py rebuilds the class), isinstance still holds, and unpatch gives the old class back. An attribute
`forward` on the instance would collide with those of wrappers (accelerate), and shallow copies of a module would go on
calling the first. Attention of transformers is a name in the model's configuration instead, which is its own way.
"""

from __future__ import annotations

import torch.nn as nn

from warploom.patch import torch_nn, transformers
from warploom.patch.report import Left, Report, Swapped
from warploom.patch.swap import Plan, restore
from warploom.patch.transformers import register_attention

__all__ = ["Left", "Report", "Swapped", "patch", "register_attention", "unpatch"]


def patch(model: nn.Module) -> Report:
    """Swap warploom's ops into the model, in place, and report what was swapped, what was left, and why.

    model: any torch.nn.Module; its layers of torch.nn and transformers that an op can do are swapped. Modules that are
    swapped already stay so, and are not reported again. What is left works as before. unpatch undoes it.
    Raises TypeError if model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    plan = Plan(model)
    transformers.plan_model(plan)
    torch_nn.plan_layers(plan)
    return plan.apply()


def unpatch(model: nn.Module) -> None:
    """Give every module that patch swapped its own class back, and transformers' models their attention and loss."""
    transformers.restore(model)
    for module in model.modules():
        restore(module)
