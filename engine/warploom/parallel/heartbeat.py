"""What each process of a run is doing, in memory that its launcher reads: step, phase, last collective, and a pulse.

A process writes into its own slot of one small file that is mapped into memory, so reporting costs a microsecond, needs
no other process, and can be read when the writer no longer runs. Without a launcher nothing is written.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PULSE_EVERY_S = 0.2
FIRST_PHASES = ("start", "set-up", "first step", "first evaluation")
"""Phases that import, compile and read data."""
PATIENT_PHASES = (*FIRST_PHASES, "checkpoint", "end")
"""Phases that take as long as they take."""

# pulse, reports, step, collectives, signals, then two texts. The counters are aligned: each is read as it was written.
_SLOT = struct.Struct("<QQqQQ32s184s")
_PULSE, _REPORTS, _STEP, _COLLECTIVES, _SIGNALS, _PHASE, _COLLECTIVE = 0, 8, 16, 24, 32, 40, 72
_NO_STEP = -1


@dataclass(frozen=True)
class Reading:
    """One process, as its slot has it."""

    pulse: int  # goes up every PULSE_EVERY_S while the interpreter runs; 0 before it began and after it ended
    reports: int  # goes up with every report and collective
    step: int | None  # steps done; None before the first report of them
    collectives: int
    signals: int  # to stop that it has received
    phase: str  # with ": part" after it in the parts of a step
    collective: str  # the last that was begun: what, dtype, shape; empty before the first

    @property
    def is_first(self) -> bool:
        return self.phase.partition(":")[0] in FIRST_PHASES

    @property
    def is_patient(self) -> bool:
        return self.phase.partition(":")[0] in PATIENT_PHASES

    def __str__(self) -> str:
        step = "before its first step" if self.step is None else f"in step {self.step + 1}"
        last = f"{self.collective} (number {self.collectives})" if self.collective else "none"
        return f"{step}, phase {self.phase!r}, last collective {last}"


class HeartbeatFile:
    """The slots of one machine's processes. The launcher creates the file, and each process opens it."""

    def __init__(self, path: Path, num_slots: int) -> None:
        self.path, self.num_slots = path, num_slots
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), num_slots * _SLOT.size)

    @classmethod
    @contextmanager
    def temporary(cls, num_slots: int) -> Iterator[HeartbeatFile]:
        """Create a file, for the length of a with block, where memory is a file system if there is such a place."""
        memory = Path("/dev/shm")
        with tempfile.NamedTemporaryFile(prefix="warploom-", dir=memory if memory.is_dir() else None) as file:
            file.truncate(num_slots * _SLOT.size)
            file.flush()
            yield cls(Path(file.name), num_slots)

    def clear(self) -> None:
        """Make every slot that of a process that has not reported."""
        for slot in range(self.num_slots):
            _SLOT.pack_into(self._memory, slot * _SLOT.size, 0, 0, _NO_STEP, 0, 0, b"start", b"")

    def read(self, slot: int) -> Reading:
        pulse, reports, step, collectives, signals, *texts = _SLOT.unpack_from(self._memory, slot * _SLOT.size)
        phase, collective = (raw.rstrip(b"\0").decode(errors="replace") for raw in texts)
        return Reading(pulse, reports, None if step == _NO_STEP else step, collectives, signals, phase, collective)

    def write_count(self, slot: int, at: int, value: int) -> None:
        struct.pack_into("<q", self._memory, slot * _SLOT.size + at, value)

    def write_text(self, slot: int, at: int, size: int, text: str) -> None:
        start = slot * _SLOT.size + at
        self._memory[start : start + size] = text.encode(errors="replace")[:size].ljust(size, b"\0")


class _Reporter:
    """This process's slot."""

    def __init__(self, file: HeartbeatFile, slot: int) -> None:
        self._file, self._slot = file, slot
        self._reports = self._collectives = 0
        self._phase = "start"

    def report(self, phase: str | None, part: str | None, step: int | None) -> None:
        if step is not None:
            self._file.write_count(self._slot, _STEP, step)
        self._phase = phase or self._phase
        if phase is not None or part is not None:
            self._file.write_text(self._slot, _PHASE, 32, self._phase if part is None else f"{self._phase}: {part}")
        self._count()

    def collective(self, what: str) -> None:
        self._file.write_text(self._slot, _COLLECTIVE, 184, what)
        self._collectives += 1
        self._file.write_count(self._slot, _COLLECTIVES, self._collectives)
        self._count()

    def signal(self) -> None:
        self._file.write_count(self._slot, _SIGNALS, 1)

    def pulse(self, stop: threading.Event) -> None:
        launcher, pulse = os.getppid(), 0
        while not stop.wait(PULSE_EVERY_S if pulse else 0.0):
            pulse += 1
            self._file.write_count(self._slot, _PULSE, pulse)
            if os.getppid() != launcher:
                # Nobody watches or ends this process any more: it saves and goes, as if it had been asked to.
                os.kill(os.getpid(), signal.SIGTERM)
                return
        # Taking an interpreter down can take seconds, and must not look like a pulse that stopped.
        self.report("end", None, None)
        self._file.write_count(self._slot, _PULSE, 0)

    def _count(self) -> None:
        self._reports += 1
        self._file.write_count(self._slot, _REPORTS, self._reports)


_reporter: _Reporter | None = None  # of this process; set by beating


@contextmanager
def beating(path: Path, num_slots: int, slot: int) -> Iterator[None]:
    """Report to the launcher that made the file, for the length of a with block."""
    global _reporter
    reporter = _Reporter(HeartbeatFile(path, num_slots), slot)
    stop = threading.Event()
    thread = threading.Thread(target=reporter.pulse, args=(stop,), name="heartbeat", daemon=True)
    thread.start()
    _reporter = reporter
    try:
        yield
    finally:
        _reporter = None
        stop.set()
        thread.join()


def is_watched() -> bool:
    """Whether a launcher reads what this process reports."""
    return _reporter is not None


def report(phase: str | None = None, *, part: str | None = None, step: int | None = None) -> None:
    """Say what this process does from now on, in which part of that it is, and how many steps it has done."""
    if _reporter is not None:
        _reporter.report(phase, part, step)


def report_collective(what: str) -> None:
    """Say which collective this process begins."""
    if _reporter is not None:
        _reporter.collective(what)


def report_signal() -> None:
    """Say that this process was asked to stop, so that the launcher does not ask: a second time ends it at once."""
    if _reporter is not None:
        _reporter.signal()
