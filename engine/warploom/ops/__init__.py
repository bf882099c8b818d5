"""The only door to a kernel. One file per op; the files found here are the list of ops, so adding one edits no list."""

import importlib
import pkgutil
from typing import TYPE_CHECKING

from warploom.ops._op import REGISTRY, Op, backend, force_from_environment

if TYPE_CHECKING:  # for type checkers, which cannot see what the loop below exports
    from warploom.ops.adamw import adamw as adamw
    from warploom.ops.attention import attention as attention
    from warploom.ops.cross_entropy import cross_entropy as cross_entropy
    from warploom.ops.embedding import embedding as embedding
    from warploom.ops.grad_norm import grad_norm as grad_norm
    from warploom.ops.layer_norm import layer_norm as layer_norm
    from warploom.ops.linear import linear as linear
    from warploom.ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
    from warploom.ops.linear_glu import linear_glu as linear_glu
    from warploom.ops.linear_qkv import linear_qkv as linear_qkv
    from warploom.ops.newton_schulz import newton_schulz as newton_schulz
    from warploom.ops.rms_norm import rms_norm as rms_norm
    from warploom.ops.rotary import rotary as rotary

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")
# Bound after the imports: importing a submodule binds its module to the same name.
globals().update({name: op.function for name, op in REGISTRY.items()})
from warploom.ops.linear import linear_relu  # noqa: E402  # the one public function that is not the name of an op

force_from_environment()

__all__ = ["REGISTRY", "Op", "backend", "linear_relu", *REGISTRY]  # noqa: PLE0604
