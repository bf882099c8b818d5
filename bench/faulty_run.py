"""A run of `warploom launch` to do harm to: its events as they come, its processes, its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class FaultyRun:
    """Start `warploom launch` with flags, running arguments (a verb and its flags); what it prints goes to log."""

    def __init__(self, folder: Path, flags: Sequence[str], arguments: Sequence[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.events_path, self.log_path = folder / "events.jsonl", folder / "log.txt"
        self.events: list[dict[str, Any]] = []
        self.pids: list[int] = []
        self._position = self.events_path.stat().st_size if self.events_path.exists() else 0
        self._log = self.log_path.open("ab")
        command = [*(sys.executable, "-m", "warploom.cli.main", "launch", "--events", str(self.events_path)), *flags]
        self.process = subprocess.Popen(
            [*command, "--", *arguments], env=environment(), stdout=self._log, stderr=subprocess.STDOUT
        )

    def __enter__(self) -> FaultyRun:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._log.close()

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def poll(self) -> list[dict[str, Any]]:
        """Return the events since the last call."""
        if not self.events_path.exists():
            return []
        with self.events_path.open("rb") as file:
            file.seek(self._position)
            lines = file.read()
        lines = lines[: lines.rfind(b"\n") + 1]
        self._position += len(lines)
        new = [json.loads(line) for line in lines.splitlines()]
        for event in new:
            if event["event"] == "start":
                self.pids = event["pids"]
        self.events += new
        return new

    def follow(self, timeout_s: float) -> Iterator[dict[str, Any]]:
        """Yield events until the run has ended. Raises TimeoutError after timeout_s."""
        until = time.monotonic() + timeout_s
        while True:
            has_ended = self.process.poll() is not None
            yield from self.poll()
            if has_ended:
                return
            if time.monotonic() > until:
                raise TimeoutError(f"still running after {timeout_s} s:\n{self.log[-4000:]}")
            time.sleep(0.01)

    def strike(self, rank: int, number: signal.Signals) -> float:
        """Send a signal to a process; return the moment, by the clock of the events."""
        os.kill(self.pids[rank], number)
        return time.monotonic()

    def of(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == name]


def environment() -> dict[str, str]:
    """What makes a process import this checkout, on one thread."""
    path = os.pathsep.join(str(ROOT / part) for part in ("engine", "kernels"))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
