"""The processes of a run on one machine, and the spares that take their place.

A process is started with nothing to do, imports what any run needs, and waits on its standard input for a line that
says what it is. So a restart does not wait for imports, which take longer than all the rest of it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence


class Processes:
    """num_processes at a time of a command that waits for a JSON line {"environment": ..., "heartbeat": ...}.

    command: what to start, the same for all. num_spares: how many wait for the next start, once prepare was called.
    """

    def __init__(self, command: Sequence[str], num_spares: int) -> None:
        self._command, self._num_spares = list(command), num_spares
        self._spares: list[subprocess.Popen[bytes]] = []
        self._running: list[subprocess.Popen[bytes]] = []

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._running]

    def start(self, orders: Sequence[Mapping[str, object]]) -> None:
        """Give each order to a process, a spare if one is left."""
        assert not self._running
        waiting = [spare for spare in self._spares if spare.poll() is None]
        self._spares = waiting[len(orders) :]
        self._running = waiting[: len(orders)] + [self._new() for _ in orders[len(waiting) :]]
        for process, order in zip(self._running, orders, strict=True):
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(order).encode() + b"\n")
                process.stdin.close()
            except BrokenPipeError:
                pass  # it is dead already, and its exit code says so

    def prepare(self) -> None:
        """Start the spares that are missing. They must not take the time of a run that is only starting."""
        self._spares = [spare for spare in self._spares if spare.poll() is None]
        self._spares += [self._new() for _ in range(self._num_spares - len(self._spares))]

    def exit_codes(self) -> dict[int, int]:
        """Return those of the processes that have ended, by their place; negative for a signal."""
        codes = {place: process.poll() for place, process in enumerate(self._running)}
        return {place: code for place, code in codes.items() if code is not None}

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all that run."""
        for process in self._running:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self, timeout_s: float) -> None:
        """Wait until all have ended, or for so long."""
        until = time.monotonic() + timeout_s
        while len(self.exit_codes()) < len(self._running) and time.monotonic() < until:
            time.sleep(0.02)

    def kill(self) -> None:
        """End all that run at once, frozen ones too, and wait for their end."""
        self._end(self._running)
        self._running = []

    def close(self) -> None:
        """End spares as well."""
        self.kill()
        self._end(self._spares)
        self._spares = []

    def _new(self) -> subprocess.Popen[bytes]:
        # In a session of its own: a Ctrl-C at the terminal reaches the launcher alone, which passes it on once.
        return subprocess.Popen(self._command, stdin=subprocess.PIPE, start_new_session=True)

    @staticmethod
    def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
