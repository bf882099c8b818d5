"""Which parameters are trained. A frozen one asks for no gradient, so the trainer and the optimizers never see it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from warploom.errors import UserError
from warploom.finetune.config import FinetuneConfig
from warploom.models.transformer import RESIDUAL_WRITERS, Transformer
from warploom.nn.lora import add_lora


def add_layers(model: Transformer, count: int) -> Transformer:
    """Return the model with `count` more blocks on top. They are copies of its last block whose outputs begin as
    zeros, so that at first the model says what it said (Wu et al., 2024, LLaMA Pro).

    Raises UserError for a post-norm model, whose blocks cannot pass their input through unchanged.
    """
    config = model.config
    if config.norm_position == "post":
        raise UserError("tune.new_layers needs a base with norm_position 'pre', this one has 'post'; train its own")
    with torch.device("meta"):
        grown = Transformer(dataclasses.replace(config, num_layers=config.num_layers + count))
    state = model.state_dict()
    last = f"stack.blocks.{config.num_layers - 1}."
    for layer in range(config.num_layers, config.num_layers + count):
        for name, tensor in [(n.removeprefix(last), t) for n, t in state.items() if n.startswith(last)]:
            writes = name.rpartition(".")[0].endswith(RESIDUAL_WRITERS)
            state[f"stack.blocks.{layer}.{name}"] = torch.zeros_like(tensor) if writes else tensor.clone()
    grown.load_state_dict(state, assign=True)
    return grown


def freeze(model: Transformer, config: FinetuneConfig, base_layers: int) -> None:
    """Leave only what config wants trained asking for gradients, and put LoRA's adapters in. base_layers: the blocks
    of the base, below config.new_layers.

    Raises UserError for patterns that fit no parameter, and if nothing is left to train.
    """
    model.requires_grad_(True)
    if config.lora.rank:
        add_lora(model, config.lora)
    elif config.new_layers:
        _train_only(model, model.stack.blocks[base_layers:])
    elif config.last_layers is not None:
        if config.last_layers > base_layers:
            raise UserError(f"tune.last_layers is {config.last_layers}, and the base has {base_layers} blocks")
        heads = [model.stack.norm] + ([] if model.lm_head is None else [model.lm_head])
        _train_only(model, [*model.stack.blocks[base_layers - config.last_layers :], *heads])
    names = dict(model.named_parameters())
    for pattern in config.freeze:
        found = [parameter for name, parameter in names.items() if fnmatch(name, pattern)]
        if not found:
            some = ", ".join(list(names)[:6])
            raise UserError(f"tune.freeze has {pattern!r}, which fits no parameter; their names are such as {some}")
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"tune.freeze {config.freeze} leaves nothing to train; give fewer patterns")


def _train_only(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    model.requires_grad_(False)
    for module in modules:
        module.requires_grad_(True)


@dataclass(frozen=True)
class HeldMemory:
    """What the tensors of a run hold after a step, measured; bytes."""

    num_parameters: int
    num_trained: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int

    def __str__(self) -> str:
        share = self.num_trained / self.num_parameters
        return (
            f"{self.num_trained:,} of {self.num_parameters:,} parameters are trained ({share:.2%}): weights "
            f"{self.weights_bytes / 1e6:,.2f} MB, gradients {self.gradients_bytes / 1e6:,.2f} MB, optimizer state "
            f"{self.optimizer_bytes / 1e6:,.2f} MB, measured after the last step."
        )


def held_memory(model: nn.Module, optimizers: Sequence[Optimizer]) -> HeldMemory:
    """Add up the tensors that exist: each parameter, each gradient, each tensor of optimizer state."""
    parameters = list(model.parameters())
    states = [t for o in optimizers for state in o.state.values() for t in state.values() if isinstance(t, Tensor)]
    return HeldMemory(
        num_parameters=sum(p.numel() for p in parameters),
        num_trained=sum(p.numel() for p in parameters if p.requires_grad),
        weights_bytes=sum(p.nbytes for p in parameters),
        gradients_bytes=sum(p.grad.nbytes for p in parameters if p.grad is not None),
        optimizer_bytes=sum(t.nbytes for t in states),
    )
