"""BackgroundSaver: the run goes on while a thread writes a copy of its state."""

from __future__ import annotations

import dataclasses
import math
import mmap
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from warploom.checkpoint.format import CheckpointState

_ALIGNMENT = 64  # bytes: of a cache line, and more than any dtype's


class BackgroundSaver:
    """Saves one state at a time, in a thread: start copies the state into host memory and returns, wait says how the
    save went. The copy's memory, as much as the tensors take, is kept for the next.

    write saves a state and returns its folder; it runs in the thread.
    """

    def __init__(self, write: Callable[[CheckpointState], Path]) -> None:
        self._write = write
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._executor = ThreadPoolExecutor(1, "checkpoint")
        self._save: Future[Path] | None = None

    def start(self, state: CheckpointState) -> None:
        """Begin to save the state as it is now; it may change as soon as this returns. One save must end before the
        next: wait comes first."""
        assert self._save is None, "wait() comes before the next start()"
        self._save = self._executor.submit(self._write, self._copy(state))

    def wait(self) -> Path | None:
        """Wait for the save that was begun and return its folder, None if there was none; raise what it raised."""
        save, self._save = self._save, None
        return None if save is None else save.result()

    @property
    def is_done(self) -> bool:
        """Whether no save is under way."""
        return self._save is None or self._save.done()

    def finish(self) -> None:
        """Wait for the save that was begun, however it goes, and end the thread."""
        self._executor.shutdown()

    def _copy(self, state: CheckpointState) -> CheckpointState:
        groups = (state.weights, state.optimizer, state.rng)
        tensors = [tensor for group in groups for tensor in group.values()]
        sizes = [math.ceil(tensor.nbytes / _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
        if self._memory.numel() < sum(sizes):
            self._memory = _host_memory(sum(sizes), pinned=any(tensor.is_cuda for tensor in tensors))
        copies = []
        for tensor, place in zip(tensors, self._memory[: sum(sizes)].split(sizes), strict=True):
            copy = place[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copies.append(copy.copy_(tensor.detach(), non_blocking=True))
        for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
            torch.cuda.synchronize(device)
        found = iter(copies)
        weights, optimizer, rng = ({name: next(found) for name in group} for group in groups)
        return dataclasses.replace(state, weights=weights, optimizer=optimizer, rng=rng)


def _host_memory(num_bytes: int, *, pinned: bool) -> Tensor:
    """(num_bytes,) uint8. Pinned memory takes copies from a GPU at full speed. Elsewhere it comes from the system and
    not from torch's allocator, whose memory the training's own figures count."""
    if pinned:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    return torch.frombuffer(mmap.mmap(-1, max(1, num_bytes)), dtype=torch.uint8)
