"""Gradient checkpointing: what a block keeps of its forward pass, and what the backward pass computes again.

Each block has `kept`: None keeps everything; otherwise only what enters the block is kept, and the outputs of the
operators named there, and the rest of the block runs again in the backward pass, with the random numbers it had. So
gradients are the same bits either way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from warploom.nn.attention import AttentionContext

# Names of operators, "warploom::linear_fwd" for each call of it or "warploom::linear_fwd#1" for the second in a block.
Kept = frozenset[str]
NOTHING: Kept = frozenset()
# What costs operations rather than memory traffic: matrix products and attention. The rest, norms, activations,
# rotations, dropout, is cheap to run again.
PRODUCTS: Kept = frozenset(
    (
        *("warploom::linear_fwd", "warploom::linear_glu_fwd", "warploom::linear_qkv_fwd", "warploom::attention_fwd"),
        *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    )
)


class Recomputable(nn.Module):
    """A module whose forward pass can run again in the backward pass; base of the blocks."""

    kept: Kept | None = None


def recomputable_blocks(model: nn.Module) -> list[Recomputable]:
    """Return the blocks of the model in the order of their names: the encoder's, if there is one, first."""
    return [module for module in model.modules() if isinstance(module, Recomputable)]


def keep(model: nn.Module, kept: Kept | None, every: int = 1) -> None:
    """Let every n-th block, beginning with the first, keep what is named, and the others everything."""
    for index, block in enumerate(recomputable_blocks(model)):
        block.kept = kept if index % every == 0 else None


def run_block(block: nn.Module, x: Tensor, stream: Tensor | None, context: AttentionContext) -> Any:
    """Return block(x, stream, context), which keeps for the backward pass what block.kept says."""
    kept = getattr(block, "kept", None)
    if kept is None or not torch.is_grad_enabled():
        return block(x, stream, context)
    if not kept:
        return checkpoint(block, x, stream, context, use_reentrant=False)
    return checkpoint(block, x, stream, context, use_reentrant=False, context_fn=lambda: _contexts(kept))


def _contexts(kept: Kept) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """What torch's checkpoint runs the forward pass in, and the second one.

    torch.utils.checkpoint.create_selective_checkpoint_contexts does the same for blocks that call exactly the same
    operators both times. Here a weight may be packed at its first use only, and so only what is kept is counted.
    """
    outputs: dict[str, tuple[Any, list[int]]] = {}
    return _Keeping(kept, outputs), _Returning(kept, outputs)


class _Counting(TorchDispatchMode):
    """Gives each call of an operator that may be kept the key under which its output is."""

    def __init__(self, kept: Kept, outputs: dict[str, tuple[Any, list[int]]]) -> None:
        super().__init__()
        self._kept, self._outputs = kept, outputs
        self._names = {name.partition("#")[0] for name in kept}
        self._calls: Counter[str] = Counter()

    def _key(self, func: Any) -> str | None:
        name = func.name()
        if name not in self._names:
            return None
        index = self._calls[name]
        self._calls[name] += 1
        key = f"{name}#{index}"
        return key if name in self._kept or key in self._kept else None


class _Keeping(_Counting):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        key = self._key(func)
        if key is not None:
            # Detached: the tensor itself will point at the graph, and the graph at what is kept.
            detached = _each(output, _detach)
            self._outputs[key] = detached, _versions(detached)
        return output


class _Returning(_Counting):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        key = self._key(func)
        if key is None:
            return func(*args, **(kwargs or {}))
        if key not in self._outputs:
            raise RuntimeError(f"{key} has no kept output: the block ran otherwise this time, or backward ran twice")
        output, versions = self._outputs.pop(key)
        if _versions(output) != versions:
            raise RuntimeError(f"the kept output of {key} was changed in place after the forward pass")
        return output


def _detach(tensor: Tensor) -> Tensor:
    # Below autograd a view has a version counter of its own, unless this key is let in; torch's checkpoint does so too.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def _each(output: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(output, Tensor):
        return change(output)
    return type(output)(change(tensor) for tensor in output)


def _versions(output: Any) -> list[int]:
    return [tensor._version for tensor in ((output,) if isinstance(output, Tensor) else output)]
