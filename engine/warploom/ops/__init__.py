"""The only door to a kernel. One file per op; the files found here are the list of ops, so adding one edits nothing else."""

import importlib
import pkgutil
from typing import TYPE_CHECKING

from warploom.ops._op import REGISTRY, Op, backend

if TYPE_CHECKING:  # for type checkers, which cannot see what the loop below exports
    from warploom.ops.layer_norm import layer_norm as layer_norm

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")
# Bound after the imports: importing a submodule binds its module to the same name.
globals().update({name: op.function for name, op in REGISTRY.items()})

__all__ = ["REGISTRY", "Op", "backend", *REGISTRY]  # noqa: PLE0604
