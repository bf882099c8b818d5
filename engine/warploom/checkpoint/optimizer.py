"""torch optimizer state <-> flat tensors named by parameter, for any optimizer with per-parameter tensors and numbers.

torch's own state_dict numbers the parameters, so a reordered model silently gets foreign moments; and its
load_state_dict casts state to the parameter's dtype. Here a name that does not match is an error and nothing is cast.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from warploom.checkpoint.format import shortened
from warploom.errors import UserError

# Options that say how a step is computed on this machine, not what it computes: a resumed run keeps its own.
_MACHINE_OPTIONS = ("foreach", "fused", "capturable", "differentiable")


def flatten_optimizer(
    optimizer: torch.optim.Optimizer, names: Iterable[tuple[str, Tensor]], prefix: str = ""
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimizer's state as tensors "<prefix><parameter name>/<key>" and the rest as a JSON object.

    names: model.named_parameters(). The tensors are the optimizer's own, not copies. Give each of several optimizers
    in a run another prefix ("adamw/"). TypeError for state that is neither a tensor nor a JSON number.
    """
    name_of = {parameter: name for name, parameter in names}
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, Any] = {}
    groups = []
    for group in optimizer.param_groups:
        groups.append({"parameters": [name_of[parameter] for parameter in group["params"]], "options": _options(group)})
        for parameter in group["params"]:
            name = name_of[parameter]
            entry: dict[str, Any] = {"shape": list(parameter.shape), "tensors": [], "scalars": {}}
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{prefix}{name}/{key}"] = value
                    entry["tensors"].append(key)
                elif value is None or isinstance(value, bool | int | float):
                    entry["scalars"][key] = value
                else:
                    raise TypeError(
                        f"optimizer state {key!r} of {name} must be a tensor or a number, got {type(value)}"
                    )
            parameters[name] = entry
    return tensors, {"class": type(optimizer).__name__, "groups": groups, "parameters": parameters}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
    names: Iterable[tuple[str, Tensor]],
    prefix: str = "",
) -> None:
    """Put flattened state into a freshly built optimizer, bit for bit; the inverse of flatten_optimizer.

    The options of each group (lr, betas, weight decay...) come back too, except those of the machine such as fused: a
    trainer that changes one does so afterwards. tensors may hold other optimizers' state under other prefixes. State
    is copied to its parameter's device, or to the optimizer's state_device if it has one.
    Raises UserError naming the parameters that are missing, too many, of another shape or in another group.
    """
    name_of = {parameter: name for name, parameter in names}
    _refuse_differences(optimizer, tensors, scalars, name_of, prefix)
    for group, saved_group in zip(optimizer.param_groups, scalars["groups"], strict=True):
        for key, value in saved_group["options"].items():
            if isinstance(group.get(key), Tensor):
                group[key].fill_(value)
            else:
                group[key] = tuple(value) if isinstance(value, list) else value
    for group in optimizer.param_groups:
        # torch keeps the step count on the CPU unless the step itself runs on the device.
        counts_on_device = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            name = name_of[parameter]
            entry = scalars["parameters"][name]
            state = dict(entry["scalars"])
            for key in entry["tensors"]:
                on_cpu = key == "step" and not counts_on_device
                device = torch.device("cpu") if on_cpu else getattr(optimizer, "state_device", parameter.device)
                state[key] = tensors[f"{prefix}{name}/{key}"].to(device, copy=True)
            optimizer.state[parameter] = state


def _refuse_differences(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
    name_of: Mapping[Tensor, str],
    prefix: str,
) -> None:
    kind = type(optimizer).__name__
    if scalars["class"] != kind:
        raise UserError(
            f"the checkpoint holds the state of {scalars['class']} and this run uses {kind}; keep the optimizer"
        )
    own = {name_of[parameter]: parameter for group in optimizer.param_groups for parameter in group["params"]}
    saved = scalars["parameters"]
    differences = [f"{name} is missing from the checkpoint" for name in own if name not in saved]
    differences += [f"{name} is not in this run" for name in saved if name not in own]
    differences += [
        f"{name} is {tuple(saved[name]['shape'])} in the checkpoint and {tuple(own[name].shape)} in this run"
        for name in own
        if name in saved and list(own[name].shape) != saved[name]["shape"]
    ]
    differences += [
        f"{prefix}{name}/{key} is missing from the checkpoint"
        for name, entry in saved.items()
        for key in entry["tensors"]
        if f"{prefix}{name}/{key}" not in tensors
    ]
    if not differences:
        groups = [{name_of[parameter] for parameter in group["params"]} for group in optimizer.param_groups]
        saved_groups = [set(group["parameters"]) for group in scalars["groups"]]
        if groups != saved_groups:
            differences.append("the same parameters are divided into other groups")
    if differences:
        raise UserError(
            f"the checkpoint's {kind} state does not fit this run: {shortened(differences)}; "
            "resume with the checkpoint's own configuration"
        )


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    options = {}
    for key, value in group.items():
        if key == "params" or key in _MACHINE_OPTIONS:
            continue
        options[key] = value.item() if isinstance(value, Tensor) else value
    return options
