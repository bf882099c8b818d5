"""The checkpoints of a run while it trains: begun when one is due, written beside the steps, their cost counted."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from warploom.checkpoint.background import BackgroundSaver
from warploom.checkpoint.format import CheckpointState
from warploom.checkpoint.ranks import save_over_ranks
from warploom.checkpoint.retention import apply_retention
from warploom.checkpoint.save import SaveFailed, save_checkpoint
from warploom.parallel import heartbeat
from warploom.train.config import RunConfig
from warploom.train.run_state import Progress

if TYPE_CHECKING:
    from warploom.parallel.apply import ParallelModel


class RunSaver:
    """Saves one run into config.train.out_dir, a state at a time. With a parallel model every process has one, and all
    call the same methods.

    capture returns the state of the run as it is. latest: the checkpoint that the run was taken up from. progress: of
    the run, which is saved as it is now.
    """

    def __init__(
        self,
        config: RunConfig,
        capture: Callable[[], CheckpointState],
        progress: Progress,
        message: Callable[[str], None],
        *,
        latest: Path | None = None,
        parallel: ParallelModel | None = None,
    ) -> None:
        self.latest = latest
        """The checkpoint that was written or taken up last."""
        self._train, self._capture, self._progress, self._message = config.train, capture, progress, message
        self._parallel = parallel
        self._background = BackgroundSaver(self._write)
        # Collectives that are compared must come one after the other, and a save has some of its own.
        self._waits = not config.train.save_in_background or config.parallel.check_collectives
        self._saved = self._state_number()
        self._stalls_s: list[float] = []
        self._started = time.perf_counter()

    def save(self, *, is_final: bool = False) -> None:
        """Save unless the state is saved, and note how long the steps had to wait for that. The last save of a run is
        on the disk when this returns, and one that failed is an error; see collect."""
        started = time.perf_counter()
        heartbeat.report("checkpoint")
        self.collect()
        if self._state_number() == self._saved:
            return
        self._background.start(self._capture())
        self._saved = self._state_number()
        if is_final or self._waits:
            self.collect(is_final=is_final)
        if not is_final:
            self._stalls_s.append(time.perf_counter() - started)

    def collect(self, *, is_final: bool = False) -> None:
        """Wait for the save that was begun last. One that failed is said; at the end of the run it is an error."""
        try:
            self.latest = self._background.wait() or self.latest
        except SaveFailed as failure:  # of one process, on all
            self._saved = (-1, -1)
            if is_final:
                raise
            self._message(f"{failure} The run goes on, and the next checkpoint will be tried at its time.")

    def finish(self) -> None:
        """Wait for the save that was begun, however it goes: afterwards the folder may be another's."""
        self._background.finish()

    def say_stall(self) -> None:
        """Say what saving, but for the last time, has cost the steps."""
        if self._stalls_s:
            share = sum(self._stalls_s) / (time.perf_counter() - self._started)
            self._message(
                f"Checkpoints: {len(self._stalls_s)} saved between steps, which waited {max(self._stalls_s):.3f} s at "
                f"most and {share:.2%} of the time."
            )

    def _state_number(self) -> tuple[int, int]:
        return self._progress.step, self._progress.evaluated_step

    def _write(self, state: CheckpointState) -> Path:
        train = self._train
        tidy = functools.partial(apply_retention, train.out_dir, train.keep_last, train.keep_best)
        if self._parallel is not None:
            return save_over_ranks(train.out_dir, state, self._parallel.ranks, tidy)
        path = save_checkpoint(train.out_dir, state)
        tidy()
        return path
