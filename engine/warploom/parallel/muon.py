"""Muon over processes: each orthogonalises whole matrices, its share of them, put together from the parts of all.

What travels is the parts of the updates, once there and once back; no matrix is orthogonalised twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from warploom.parallel.collectives import exchange
from warploom.parallel.mesh import Mesh
from warploom.parallel.shard import Part, part_at
from warploom.parallel.tensor import Slices


class PartedMatrices:
    """An optim.muon.MatrixExchange. whole: of each parameter its whole shape, and how the tensor axis cuts it."""

    def __init__(self, mesh: Mesh, whole: Mapping[Tensor, tuple[torch.Size, Slices | None]]) -> None:
        self._axis = mesh.axis["matrix"]
        self._fsdp, self._tensor = mesh.axis["fsdp"].size, mesh.axis["tensor"].size
        self._whole = whole

    def whole_shape(self, param: Tensor) -> tuple[int, ...]:
        return tuple(self._whole[param][0])

    def apply(self, function: Callable[[Tensor], Tensor], params: list[Tensor], parts: list[Tensor]) -> list[Tensor]:
        n, me = self._axis.size, self._axis.index
        boxes = [[self._box(param, index) for index in range(n)] for param in params]  # of each matrix, by process
        owned = [range(owner, len(params), n) for owner in range(n)]  # whose matrices are whose
        nothing = parts[0].new_empty(0)

        received = exchange(
            [torch.cat([nothing, *(parts[i].reshape(-1) for i in owned[owner])]) for owner in range(n)],
            [sum(boxes[i][source].numel for i in owned[me]) for source in range(n)],
            self._axis,
        )
        matrices = parts[0].new_empty(len(owned[me]), *self.whole_shape(params[0]))
        for source, flat in enumerate(received):
            pieces = flat.split([boxes[i][source].numel for i in owned[me]])
            for matrix, i, piece in zip(matrices, owned[me], pieces, strict=True):
                boxes[i][source].of(matrix).copy_(piece.view(boxes[i][source].shape))
        if len(matrices):
            matrices = function(matrices)

        received = exchange(
            [
                torch.cat(
                    [nothing, *(boxes[i][to].of(m).reshape(-1) for m, i in zip(matrices, owned[me], strict=True))]
                )
                for to in range(n)
            ],
            [sum(boxes[i][me].numel for i in owned[owner]) for owner in range(n)],
            self._axis,
        )
        results = list(parts)
        for owner, flat in enumerate(received):
            pieces = flat.split([boxes[i][me].numel for i in owned[owner]])
            for i, piece in zip(owned[owner], pieces, strict=True):
                results[i] = piece.view(boxes[i][me].shape)
        return results

    def _box(self, param: Tensor, index: int) -> Part:
        shape, slices = self._whole[param]
        assert slices is not None or self._tensor == 1  # else every process of the axis would send all of it
        fsdp, tensor = divmod(index, self._tensor)
        return part_at(shape, slices, tensor, (fsdp, self._fsdp))
