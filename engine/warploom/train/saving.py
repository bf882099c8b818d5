"""The checkpoints of a run while it trains: begun when one is due, written beside the steps, their cost counted."""

from __future__ import annotations

import collections
import functools
import math
import statistics
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
from warploom.train.monitor import Monitor, SaveRecord
from warploom.train.run_state import Progress

if TYPE_CHECKING:
    from warploom.parallel.apply import ParallelModel


_COSTS_KEPT = 9


def save_interval(cost_s: float, fault_every_s: float) -> float:
    """Return after how many seconds to save again so that saves and what a fault undoes take the least time together:
    sqrt(2 cost_s fault_every_s), the first-order optimum of Young (1974), good where a save takes far less than the
    time between faults."""
    return math.sqrt(2 * cost_s * fault_every_s)


class RunSaver:
    """Saves one run into config.train.out_dir, a state at a time. With a parallel model every process has one, and all
    call the same methods.

    capture returns the state of the run as it is. progress: of the run, which is saved as it is now. latest: the
    checkpoint that the run was taken up from. The monitor is told what each save cost: the time for which steps waited.
    Beside them a save takes the processor's time for writing, which counts for when the next one is due.
    """

    def __init__(
        self,
        config: RunConfig,
        capture: Callable[[], CheckpointState],
        progress: Progress,
        monitor: Monitor | None,
        *,
        latest: Path | None = None,
        parallel: ParallelModel | None = None,
    ) -> None:
        self.latest = latest
        """The checkpoint that was written or taken up last."""
        self._train, self._capture, self._progress, self._monitor = config.train, capture, progress, monitor
        self._parallel = parallel
        self._background = BackgroundSaver(self._write)
        # Collectives that are compared must come one after the other, and a save has some of its own.
        self._waits = not config.train.save_in_background or config.parallel.check_collectives
        self._saved = self._state_number()
        self._stalls_s: list[float] = []
        self._costs_s: collections.deque[float] = collections.deque(maxlen=_COSTS_KEPT)
        self._write_s = 0.0  # of the processor, for the save before
        self._started = self._begun = time.perf_counter()

    @property
    def is_due(self) -> bool:
        """Whether train.fault_every_s wants the run to be saved now, by the clock and the saves of this process. The
        first is due at once: it shows what they take."""
        if not self._train.fault_every_s or not self._background.is_done:
            return False
        cost_s = statistics.median(self._costs_s) if self._costs_s else 0.0
        return time.perf_counter() - self._begun >= save_interval(cost_s, self._train.fault_every_s)

    def save(self, *, is_final: bool = False) -> None:
        """Save unless the state is saved, and note how long the steps had to wait for that. The last save of a run is
        on the disk when this returns, and one that failed is an error; see collect."""
        started = time.perf_counter()
        heartbeat.report("checkpoint")
        self.collect()
        if self._state_number() == self._saved:
            return
        write_s = 0.0 if self._waits else self._write_s
        self._begun = started
        if self._monitor is not None:
            self._monitor.write()
        self._background.start(self._capture())
        self._saved = self._state_number()
        if is_final or self._waits:
            self.collect(is_final=is_final)
        if not is_final:
            stall_s = time.perf_counter() - started
            self._stalls_s.append(stall_s)
            self._costs_s.append(stall_s + write_s)
            if self._monitor is not None:
                self._monitor.save(SaveRecord(self._progress.step, stall_s))

    def collect(self, *, is_final: bool = False) -> None:
        """Wait for the save that was begun last. One that failed is said; at the end of the run it is an error."""
        try:
            self.latest = self._background.wait() or self.latest
        except SaveFailed as failure:  # of one process, on all
            self._saved = (-1, -1)
            if is_final:
                raise
            if self._monitor is not None:
                self._monitor.message(f"{failure} The run goes on, and the next checkpoint will be tried at its time.")

    def finish(self) -> None:
        """Wait for the save that was begun, however it goes: afterwards the folder may be another's."""
        self._background.finish()

    def say_stall(self) -> None:
        """Say what saving, but for the last time, has cost the steps."""
        if self._stalls_s and self._monitor is not None:
            share = sum(self._stalls_s) / (time.perf_counter() - self._started)
            self._monitor.message(
                f"Checkpoints: {len(self._stalls_s)} saved between steps, which waited {max(self._stalls_s):.3f} s at "
                f"most and {share:.2%} of the time."
            )

    def _state_number(self) -> tuple[int, int]:
        return self._progress.step, self._progress.evaluated_step

    def _write(self, state: CheckpointState) -> Path:
        started = time.thread_time()
        try:
            return self._write_to_disk(state)
        finally:
            self._write_s = time.thread_time() - started

    def _write_to_disk(self, state: CheckpointState) -> Path:
        train = self._train
        tidy = functools.partial(apply_retention, train.out_dir, train.keep_last, train.keep_best)
        if self._parallel is not None:
            return save_over_ranks(train.out_dir, state, self._parallel.ranks, tidy)
        path = save_checkpoint(train.out_dir, state)
        tidy()
        return path
