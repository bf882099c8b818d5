"""Layers of torch.nn that are made of others: MultiheadAttention, the Transformer layers, Sequential."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor

from warploom.nn.autocast import dense
from warploom.nn.multihead_attention import MultiheadAttention
from warploom.patch.dense import LinearSwap, has_hooks, op_activation, plan_linear
from warploom.patch.norms import plan_norm
from warploom.patch.swap import Plan, Swap


class MultiheadAttentionSwap(Swap, MultiheadAttention):
    """torch.nn.MultiheadAttention."""


class _TransformerLayerSwap(Swap):
    last_dropout: str
    linear1: nn.Module
    linear2: nn.Module
    dropout: nn.Module
    activation: Any

    # torch's fused inference path reads the weights and would pass the swapped layers by; 0 is the value that bars it.
    activation_relu_or_gelu = property(lambda self: 0)

    def _ff_block(self, x: Tensor) -> Tensor:
        name = None if has_hooks(self.linear1) else op_activation(self.activation)
        if name is None or not isinstance(self.linear1, LinearSwap):
            h = self.activation(self.linear1(x))
        else:
            h = dense(x, self.linear1.weight, self.linear1.bias, name)
        return getattr(self, self.last_dropout)(self.linear2(self.dropout(h)))


class TransformerEncoderLayerSwap(_TransformerLayerSwap):
    """torch.nn.TransformerEncoderLayer, with the activation taken into linear1."""

    last_dropout = "dropout2"


class TransformerDecoderLayerSwap(_TransformerLayerSwap):
    """torch.nn.TransformerDecoderLayer, likewise."""

    last_dropout = "dropout3"


class TransformerEncoderSwap(Swap):
    """torch.nn.TransformerEncoder, which must hand its layers no nested tensors: only the fused path takes them."""

    use_nested_tensor = property(lambda self: False)


class SequentialSwap(Swap):
    """torch.nn.Sequential, in which a Linear takes in the activation behind it.

    The children stay what they are, since they can be reached and called one by one from outside.
    """

    def forward(self, input: Any) -> Any:
        children = [module for module in self._modules.values() if module is not None]
        while children:
            module: Any = children.pop(0)
            name = _taken_in(module, children[0]) if children else None
            if name is None:
                input = module(input)
            else:
                input = dense(input, module.weight, module.bias, name)
                children.pop(0)
        return input


def _taken_in(module: nn.Module, following: nn.Module) -> str | None:
    """Name the activation that a Linear can take in, None if there is no such pair."""
    is_linear = type(module) is nn.Linear or (isinstance(module, LinearSwap) and module.original is nn.Linear)
    return None if not is_linear or has_hooks(module) or has_hooks(following) else op_activation(following)


_LAYERS: dict[type[nn.Module], type[Swap]] = {
    nn.TransformerEncoderLayer: TransformerEncoderLayerSwap,
    nn.TransformerDecoderLayer: TransformerDecoderLayerSwap,
}


def plan_layers(plan: Plan) -> None:
    """Plan every layer of torch.nn that nothing was decided about."""
    for path, module in plan.model.named_modules():
        if not plan.undecided(module):
            continue
        if type(module) in _LAYERS:
            _plan_layer(plan, path, module)
        elif type(module).forward is nn.Sequential.forward:
            _plan_sequential(plan, path, module)
        elif type(module) is nn.MultiheadAttention:
            _plan_attention(plan, path, module)
        elif isinstance(module, MultiheadAttention):
            plan.skip(module.out_proj)  # which is on the op already
        else:
            plan_norm(plan, path, module)
            plan_linear(plan, path, module)
    for module in plan.model.modules():
        if type(module) is nn.TransformerEncoder and any(plan.swaps(inner) for inner in module.modules()):
            plan.swap_quietly(module, TransformerEncoderSwap)


def _plan_layer(plan: Plan, path: str, module: nn.Module) -> None:
    name = op_activation(module.activation)
    if name is None:
        kind = getattr(module.activation, "__name__", type(module.activation).__name__)
        plan.leave(f"{path}.linear1".lstrip("."), module, "linear + activation", f"no kernel has {kind} in it")
    plan.swap(path, module, _LAYERS[type(module)], "linear" if name is None else f"linear + {name}")


def _plan_sequential(plan: Plan, path: str, module: nn.Module) -> None:
    children = [*module.named_children()]
    for (first, linear), (_, activation) in zip(children, children[1:], strict=False):
        name = _taken_in(linear, activation)
        if name is not None:
            plan.swap(f"{path}.{first}".lstrip("."), module, SequentialSwap, f"linear + {name}")


def _plan_attention(plan: Plan, path: str, module: nn.MultiheadAttention) -> None:
    plan.skip(module.out_proj)  # whose weights alone are used, with the op or without
    if module.dropout > 0:
        plan.leave(path, module, "attention", f"dropout {module.dropout:g} on attention probabilities")
    elif module.bias_k is not None or module.add_zero_attn:
        plan.leave(path, module, "attention", "it adds a key (add_bias_kv or add_zero_attn)")
    else:
        plan.swap(path, module, MultiheadAttentionSwap, "attention")
