"""Plain model parallelism: the blocks of one model over the devices of one process, one after another.

Only one device computes at a time: what it gives is room. The embedding and the output layer stay on the first device,
where a tied weight can serve both, so tokens and targets go there and the hidden states come back at the end.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from warploom.models.transformer import Transformer
from warploom.nn.attention import AttentionContext


def spread(model: Transformer, devices: Sequence[torch.device]) -> None:
    """Move the model onto the devices, its blocks in order and equally many on each; where they do not come out even,
    one fewer on the first devices, which have the rest of the model on them.

    An encoder's blocks come before the decoder's. The model is called as before, with tensors on the first device.
    """
    stacks = [stack for stack in (model.encoder, model.stack) if stack is not None]
    total = sum(len(stack.blocks) for stack in stacks)
    places = iter([devices[-1 - len(devices) * left // total] for left in reversed(range(total))])
    contexts = {device: _ContextOn(device) for device in devices}
    model.to(devices[0])
    for stack in stacks:
        before: nn.Module = stack.dropout
        for block in stack.blocks:
            place = next(places)
            block.to(place)
            # What enters a block is moved behind the one before: with recomputation the block's own dropout repeats
            # its random numbers by the device that its input is on.
            before.register_forward_hook(_SendTo(place))
            block.register_forward_pre_hook(contexts[place])
            before = block
        before.register_forward_hook(_SendTo(devices[0]))


class _SendTo:
    """Behind a module: move what it returns, a tensor or a tuple of tensors and None."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, Tensor):
            return output.to(self.device)
        return tuple(None if part is None else part.to(self.device) for part in output)


class _ContextOn:
    """Before a block: give it the context of its stack with all tensors on its device. They are moved once for all of
    the device's blocks, and let go with the context that they came from."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._of: weakref.ref[AttentionContext] | None = None
        self._moved: AttentionContext | None = None

    def __call__(self, block: nn.Module, args: tuple) -> tuple:
        x, stream, context = args
        if self._of is None or self._of() is not context:
            tensors = {field.name: getattr(context, field.name) for field in dataclasses.fields(context)}
            moved = {name: value.to(self.device) for name, value in tensors.items() if isinstance(value, Tensor)}
            self._moved = dataclasses.replace(context, **moved)
            self._of = weakref.ref(context, self._let_go)
        return x, stream, self._moved

    def _let_go(self, gone: weakref.ref) -> None:
        if self._of is gone:
            self._of = self._moved = None
