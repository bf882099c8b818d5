"""LoRA (Hu et al., 2021): a frozen Linear whose product gets a small trained one added to it.

    y = activation(x W^T + bias + (alpha / rank) (x A^T) B^T)

B begins as zeros, so an adapted model begins as the model it adapts. The names of the base's parameters stay as they
are, those of the adapter end in lora_a and lora_b.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
import torch.nn as nn
from torch import Tensor

from warploom.errors import UserError
from warploom.nn.linear import Linear
from warploom.ops.linear import ACTIVATIONS, linear

_ADAPTER_NAMES = ("lora_a", "lora_b")


@dataclass(frozen=True)
class LoRAConfig:
    rank: int = 0
    """Rank of the adapters; 0 trains none."""
    alpha: float = 16.0
    """The adapters' product is scaled by alpha / rank."""
    dropout: float = 0.0
    """Probability with which elements of an adapter's input are dropped in training."""
    targets: tuple[str, ...] = ("*_proj",)
    """Patterns of the names of the layers that get one, such as q_proj, *.attention.* or stack.blocks.3.*."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise UserError(f"lora.rank is {self.rank}; give 0 (no adapters) or more, 8 is usual")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout is {self.dropout}; give a fraction from 0 to below 1")
        if not self.alpha > 0:
            raise UserError(f"lora.alpha is {self.alpha}; give a number above 0")


class LoRALinear(Linear):
    """Takes the place of a Linear, whose parameters it shares and freezes. lora_a: (rank, C); lora_b: (F, rank)."""

    def __init__(self, base: Linear, config: LoRAConfig) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, "meta", activation=base.activation)
        self.weight, self.bias, self.packed = base.weight, base.bias, base.packed
        self.scale = config.alpha / config.rank
        self.merged = False
        self.dropout = nn.Dropout(config.dropout)
        self.lora_a = nn.Parameter(base.weight.new_empty(config.rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, config.rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.requires_grad_(False)
        self.lora_a.requires_grad_(True)
        self.lora_b.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return super().forward(x)
        y = linear(x, *self.parameters_for(x), "none", self.packed)
        return ACTIVATIONS[self.activation](self.adapt(y, x))

    def adapt(self, y: Tensor, x: Tensor) -> Tensor:
        """Add the adapter's product to y (..., F), the base's of x (..., C), if the base does not hold it already."""
        if self.merged:
            return y
        a, b = (w if w.dtype == torch.float32 and x.dtype != torch.float64 else w.to(x.dtype) for w in self._factors())
        # The scale goes over rank columns instead of F.
        return y + linear(linear(self.dropout(x), a) * self.scale, b)

    def merge(self) -> None:
        """Add the adapter to the base's weight, which then serves alone."""
        if not self.merged:
            self._add(self.scale)
            self.merged = True

    def unmerge(self) -> None:
        """Take it out again: the weight is back to float32 rounding."""
        if self.merged:
            self._add(-self.scale)
            self.merged = False

    def _factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_a, self.lora_b

    @torch.no_grad()
    def _add(self, scale: float) -> None:
        self.weight.addmm_(self.lora_b, self.lora_a, alpha=scale)


def add_lora(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Freeze the model and put adapters on the layers that config.targets name; return the layers' names.

    A pattern is held against the whole name of a layer and against its last part. Raises UserError for a pattern that
    no layer fits.
    """
    layers = {name: module for name, module in model.named_modules() if type(module) is Linear}
    chosen: dict[str, Linear] = {}
    for pattern in config.targets:
        found = {n: m for n, m in layers.items() if fnmatch(n, pattern) or fnmatch(n.rpartition(".")[2], pattern)}
        if not found:
            parts = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise UserError(f"lora.targets has {pattern!r}, which fits no layer; their names end in {parts}")
        chosen.update(found)
    model.requires_grad_(False)
    for name, layer in chosen.items():
        _put(model, name, LoRALinear(layer, config))
    return list(chosen)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def merge_lora(model: nn.Module) -> None:
    """Add every adapter to its base's weight."""
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge_lora(model: nn.Module) -> None:
    """Take every adapter out of its base's weight again."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def bake_lora(model: nn.Module) -> None:
    """Merge every adapter and put plain Linear layers back: the model is as if it had been trained in full."""
    for name, layer in lora_layers(model).items():
        layer.merge()
        plain = Linear(
            layer.in_features, layer.out_features, layer.bias is not None, "meta", activation=layer.activation
        )
        plain.weight, plain.bias, plain.packed = layer.weight, layer.bias, layer.packed
        _put(model, name, plain)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state_dict of the adapters alone."""
    return {name: tensor for name, tensor in model.state_dict().items() if is_adapter_name(name)}


def base_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state_dict without the adapters."""
    return {name: tensor for name, tensor in state.items() if not is_adapter_name(name)}


def is_adapter_name(name: str) -> bool:
    return name.rpartition(".")[2] in _ADAPTER_NAMES


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
