"""LayerNorm over the last dimension, forward and backward: launchers of the kernels in _norm_rows.py.

They take the arguments of the operators warploom::layer_norm_fwd and _bwd and return what those return.
"""

from __future__ import annotations

from torch import Tensor

from warploom_kernels._norm_rows import launch_norm_bwd, launch_norm_fwd


def launch_layer_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return launch_norm_fwd(x, weight, bias, residual, eps, centred=True)


def launch_layer_norm_bwd(
    dy: Tensor, dstream: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_norm_bwd(dy, dstream, x, weight, mean, rstd)
