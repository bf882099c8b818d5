"""AdamW and Muon whose state lies in the host's memory: the moments of one parameter at a time visit the device.

An update is the same as with the state on the device, and costs its way there and back: 8 bytes per parameter and
moment. Worth it where the moments do not fit, and the more micro batches an update has. The classes keep the names of
those they extend, so that checkpoints of either go on with the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from warploom.optim import adamw, muon

HOST = torch.device("cpu")


class _StateOnHost:
    """Mixed in before an optimizer: step() makes the update parameter by parameter."""

    state_device = HOST  # where checkpoint.restore_optimizer puts state
    param_groups: list[dict[str, Any]]
    state: dict[Tensor, dict[str, Any]]

    def step(self, closure: None = None, *, grad_factor: float = 1.0) -> None:
        """Make one step, as if every gradient were grad_factor times what it is."""
        members = [group["params"] for group in self.param_groups]
        try:
            for group in self.param_groups:
                group["params"] = []
            for group, params in zip(self.param_groups, members, strict=True):
                for param in params:
                    if param.grad is not None:
                        group["params"] = [param]
                        self._step_one(param, grad_factor)
                group["params"] = []
        finally:
            for group, params in zip(self.param_groups, members, strict=True):
                group["params"] = params

    def _step_one(self, param: Tensor, grad_factor: float) -> None:
        at_home = dict(self.state[param])
        self.state[param] = {key: visit(value, param.device) for key, value in at_home.items()}
        super().step(grad_factor=grad_factor)  # type: ignore[misc]
        self.state[param] = {key: go_home(value, at_home.get(key)) for key, value in self.state[param].items()}


def visit(value: Any, device: torch.device) -> Any:
    """Return state for use on the device. Counts, of no dimension, stay where the optimizer keeps them."""
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) and value.dim() else value


def go_home(value: Any, home: Tensor | None) -> Any:
    """Return state in the host's memory: in `home`, where it was, or pinned memory the first time."""
    if not isinstance(value, Tensor) or not value.dim() or value is home:
        return value
    if home is None or home.device != HOST:
        home = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
    return home.copy_(value)


class AdamW(_StateOnHost, adamw.AdamW):  # type: ignore[misc]
    """optim.AdamW with its moments on the host."""


class Muon(_StateOnHost, muon.Muon):  # type: ignore[misc]
    """optim.Muon with its momentum on the host."""
