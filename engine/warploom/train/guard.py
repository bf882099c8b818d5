"""The signals that ask a run to stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any

from warploom.parallel import heartbeat

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Time that a step has to end after a signal. Schedulers kill 10 to 30 s after SIGTERM, and a checkpoint follows.
GRACE_S = 3.0
LONG_STEP_S = 1.0
"""After a step that took less, the next is not given up: it ends well within the grace."""


class StepAbandoned(Exception):
    """A step was given up between two micro batches, before it changed anything."""


class StopSignals:
    """Within the block the first SIGINT or SIGTERM only sets `received`; a second one kills the process at once.

    At once means by the kernel, even while a long operation holds the interpreter: a checkpoint being written stays
    temporary, and so does no harm. Outside the main thread, where Python allows no handlers, nothing is changed.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._before: Mapping[signal.Signals, Any] = {}

    @property
    def overdue(self) -> bool:
        """Whether a signal came longer ago than a step may still take."""
        return self.received is not None and time.monotonic() - self._received_at >= GRACE_S

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received, self._received_at = signal.Signals(number), time.monotonic()
        heartbeat.report_signal()
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
