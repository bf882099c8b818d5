"""RMSNorm over the last dimension, forward and backward: launchers of the kernels in _norm_rows.py.

They take the arguments of the operators warploom::rms_norm_fwd and _bwd and return what those return.
"""

from __future__ import annotations

from torch import Tensor

from warploom_kernels._norm_rows import launch_norm_bwd, launch_norm_fwd


def launch_rms_norm_fwd(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, stream, _, rstd = launch_norm_fwd(x, weight, None, residual, eps, centred=False)
    return y, stream, rstd


def launch_rms_norm_bwd(
    dy: Tensor, dstream: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    dx, dweight, _ = launch_norm_bwd(dy, dstream, x, weight, None, rstd)
    return dx, dweight
