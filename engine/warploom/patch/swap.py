"""Swapping the class of a module, back and forth, and the plan of which modules of a model to swap."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from warploom.ops import REGISTRY
from warploom.patch.report import Left, Report, Swapped


class Swap(nn.Module):
    """Base of the classes that hold a new forward; a swapped module gets a subclass of one of them and of its own."""

    original: type[nn.Module]
    is_original = True
    """Whether a swapped module stays an instance of its own class. A Linear that has taken in the ReLU behind it must
    not: whoever wraps or quantises Linears would compute something else."""

    attributes: tuple[tuple[str, Any], ...] = ()
    """What else the class holds, the same for every module of it."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so copies and pickles name what it is made of.
        recipe = self.original, type(self).__mro__[1], self.attributes
        return _rebuild, recipe, *super().__reduce_ex__(protocol)[2:]

    def _get_name(self) -> str:
        return f"warploom {type(self).__name__}"  # what the model's repr says


_CLASSES: dict[tuple[Any, ...], type[Swap]] = {}


def _swapped_class(original: type[nn.Module], swap: type[Swap], attributes: tuple[tuple[str, Any], ...]) -> type[Swap]:
    key = original, swap, attributes
    if key not in _CLASSES:
        bases = (swap, original) if swap.is_original else (swap,)
        # Trainers and savers of transformers look at the name of a class, which therefore stays.
        namespace = {**dict(attributes), "attributes": attributes, "original": original, "__module__": swap.__module__}
        _CLASSES[key] = type(original.__name__, bases, namespace)
    return _CLASSES[key]


def _rebuild(*recipe: Any) -> Swap:
    cls = _swapped_class(*recipe)
    return cls.__new__(cls)


def restore(module: nn.Module) -> None:
    """Give a swapped module its own class back; leave others alone."""
    if isinstance(module, Swap):
        module.__class__ = module.original  # type: ignore[assignment]


class Plan:
    """What to swap in one model and what to leave. Nothing happens to the model before apply."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._actions: list[Callable[[], None]] = []
        self._decided: set[nn.Module] = set()
        self._taken: set[nn.Module] = set()
        self._swapped: list[Swapped] = []
        self._left: list[Left] = []
        self._places = Counter(module for _, module in model.named_modules(remove_duplicate=False))

    def undecided(self, module: nn.Module) -> bool:
        """Whether the module is neither in this plan yet nor swapped by an earlier one."""
        return module not in self._decided and not isinstance(module, Swap)

    def swaps(self, module: nn.Module) -> bool:
        """Whether this plan swaps the module."""
        return module in self._taken

    def is_shared(self, module: nn.Module) -> bool:
        """Whether the module stands in several places of the model."""
        return self._places[module] > 1

    def swap(self, path: str, module: nn.Module, swap: type[Swap], kind: str, **attributes: Any) -> bool:
        """Plan to swap the module, or to leave it if something speaks against that; say which. kind: the name of the
        op, and what else goes into it; attributes: of the class that the module gets."""
        reason = obstacle(module, kind.partition(" ")[0])
        if reason is not None:
            self.leave(path, module, kind, reason)
            return False
        self.note(path, kind)
        self.swap_quietly(module, swap, **attributes)
        return True

    def swap_quietly(self, module: nn.Module, swap: type[Swap], **attributes: Any) -> None:
        """Plan to swap a module that is part of another entry of the report."""
        self._decided.add(module)
        self._taken.add(module)
        cls = _swapped_class(type(module), swap, tuple(attributes.items()))
        self.act(lambda: setattr(module, "__class__", cls))

    def leave(self, path: str, module: nn.Module, kind: str, reason: str) -> None:
        self._decided.add(module)
        self._left.append(Left(path, kind, reason))

    def skip(self, module: nn.Module) -> None:
        """Decide that the module is part of another and stays as it is."""
        self._decided.add(module)

    def note(self, path: str, kind: str) -> None:
        """Report something as swapped."""
        self._swapped.append(Swapped(path, kind))

    def act(self, action: Callable[[], None]) -> None:
        """Plan anything else."""
        self._actions.append(action)

    def apply(self) -> Report:
        for action in self._actions:
            action()
        return Report(tuple(self._swapped), tuple(self._left))


def obstacle(module: nn.Module, op: str) -> str | None:
    """Say why the op cannot take this module over, None if it can."""
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance"
    for name, tensor in module.named_parameters(recurse=False):
        if not tensor.is_floating_point() or torch.finfo(tensor.dtype).bits < 16:
            return f"its {name} is {tensor.dtype}"
        if type(tensor) not in (nn.Parameter, torch.Tensor):
            return f"its {name} is a {type(tensor).__name__}"
    device = next((tensor.device.type for tensor in module.parameters()), "cpu")
    record = REGISTRY[op]
    if record.forced() is None and record.choice(device) == "reference":
        return f"{op} has no kernel for {device} on this machine, see warploom doctor"
    return None
