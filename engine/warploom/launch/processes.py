"""The processes of a run on one machine: forks of a server that has imported everything (parallel/fork_server.py)."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
from collections.abc import Mapping, Sequence

from warploom.parallel import fork_server

_END_WITHIN_S = 30.0


class Processes:
    """Starts, signals and ends a set of processes at a time, each of which is run(its orders). Make it before there are
    threads."""

    def __init__(self, run: fork_server.Run) -> None:
        self._run = run
        self._codes: dict[int, int] = {}
        self.pids: list[int] = []
        self._start_server()

    def start(self, orders: Sequence[Mapping[str, object]]) -> None:
        """Give each of the orders to a process of its own."""
        assert len(self._codes) == len(self.pids)
        if self._has_lost_server():
            self._start_server()
        self.pids, self._codes = [], {}
        lines = b"".join(json.dumps(order).encode() + b"\n" for order in orders)
        with contextlib.suppress(BrokenPipeError):  # then the server has ended, which its reports say
            while lines:
                lines = lines[os.write(self._orders, lines) :]
        while len(self.pids) < len(orders) and self._read(None):
            pass
        for place in range(len(self.pids), len(orders)):  # the server has ended
            self.pids.append(self._server)
            self._codes[place] = 1

    def exit_codes(self) -> dict[int, int]:
        """Return those of the processes that have ended, by their place; negative for a signal."""
        while self._read(0.0):
            pass
        if self._has_lost_server():
            # Nobody knows how its forks end; they see that it is gone, and end as well.
            return {place: self._codes.get(place, 1) for place in range(len(self.pids))}
        return dict(self._codes)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all that run."""
        while self._read(0.0):
            pass
        for place, pid in enumerate(self.pids):
            if place not in self._codes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def wait(self, timeout_s: float) -> None:
        """Wait until all have ended, or for so long."""
        until = time.monotonic() + timeout_s
        while len(self.exit_codes()) < len(self.pids) and time.monotonic() < until:
            self._read(0.1)

    def kill(self) -> None:
        """End all that run at once, frozen ones too, and wait for their end."""
        self.signal(signal.SIGKILL)
        self.wait(_END_WITHIN_S)
        self.pids, self._codes = [], {}

    def close(self) -> None:
        """End the server as well."""
        self.kill()
        os.close(self._orders)
        if not self._has_lost_server():
            os.close(self._reports)
            os.waitpid(self._server, 0)

    def _start_server(self) -> None:
        self._server, self._orders, self._reports = fork_server.start(self._run)
        self._received = b""

    def _has_lost_server(self) -> bool:
        return self._reports < 0

    def _read(self, timeout_s: float | None) -> bool:
        """Take up what the server reports within the time (None: however long it takes); return whether it did."""
        if self._has_lost_server() or not select.select([self._reports], [], [], timeout_s)[0]:
            return False
        data = os.read(self._reports, 1 << 16)
        if not data:
            os.close(self._reports)
            self._reports = -1
            os.waitpid(self._server, 0)
            return False
        *lines, self._received = (self._received + data).split(b"\n")
        for report in map(json.loads, lines):
            if "code" not in report:
                self.pids.append(report["pid"])
            elif report["pid"] in self.pids:
                self._codes[self.pids.index(report["pid"])] = report["code"]
        return True
