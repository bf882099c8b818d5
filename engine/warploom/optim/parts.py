"""Parameters that are DTensors of torch.distributed: an optimizer updates the part that lies in this process."""

from __future__ import annotations

from torch import Tensor


def local_part(tensor: Tensor) -> Tensor:
    """Return the plain tensor that holds this process's part of a DTensor, and any other tensor as it is.

    By the method's name: DTensor's module takes about half a second to import, which only runs of many processes pay.
    """
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
