"""Programs that a model wrote, run where they can do no harm: in a process of their own without network, files, other
processes or much memory. sandbox_child.py is what locks it in; this side starts it, waits, and kills.

It is a defence against careless and clumsy code, and a strong one where the kernel offers all locks. For code that is
meant to break out, run the whole evaluation in a virtual machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from warploom.errors import UserError

_CHILD = Path(__file__).with_name("sandbox_child.py")
_START_S = 20.0  # what an interpreter may take to start on a busy machine, beside the time of the program
_SLICE_S = 0.1
_MAX_REPORT = 1 << 16


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    status: Literal["passed", "failed", "timed out"]
    """passed: it ran to its end. failed: an error, an exit, a kill by a limit."""
    message: str
    """failed: the error."""
    locks: tuple[str, ...]
    """Which locks of the kernel were on, beside those without which nothing runs."""

    @property
    def isolation(self) -> str:
        return describe(self.locks)


def describe(locks: Sequence[str]) -> str:
    """Say how a program was isolated."""
    always = "own process group, limits, no privileges, audit hook, empty folder, isolated interpreter"
    return f"{always}; of the kernel: {', '.join(locks) or 'none of namespaces, read-only files, landlock'}"


def run_program(program: str, *, timeout_s: float = 3.0, memory_bytes: int = 1 << 30) -> Outcome:
    """Run a Python program and say whether it came to its end.

    timeout_s: of processor time; of the clock it has three times as much, from when it is locked in.
    Raises UserError if the locks that must hold cannot be put on: then nothing was run.
    """
    secret = secrets.token_hex(32).encode() + b"\n"
    cpu_s = max(1, round(timeout_s))
    reading, writing = os.pipe()
    with contextlib.closing(os.fdopen(reading, "rb", buffering=0)), tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # another user may have to stand in it
        with tempfile.TemporaryFile() as source:
            source.write(secret + program.encode("utf-8"))
            source.seek(0)
            command = [sys.executable, "-I", "-S", "-B", str(_CHILD), str(writing), str(cpu_s), str(memory_bytes)]
            try:
                process = subprocess.Popen(
                    command,
                    stdin=source,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd=folder,
                    env={"LC_ALL": "C.UTF-8"},
                    pass_fds=(writing,),
                    start_new_session=True,
                )
            finally:
                os.close(writing)
        try:
            select.select([reading], [], [], _START_S)
            late = not _ends_within(process, 3 * cpu_s)
        finally:
            _kill(process)
        report = _read(reading)
    return _outcome(report, secret, late, process.returncode)


def run_programs(programs: Sequence[str], *, workers: int, timeout_s: float = 3.0) -> Iterator[Outcome]:
    """Run programs side by side and yield how they ended, in their order."""
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda program: run_program(program, timeout_s=timeout_s), programs)


def _ends_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait in slices and count these, so that a machine that stands still, or is too busy to run even this process,
    takes nothing from the program's time."""
    for _ in range(round(seconds / _SLICE_S)):
        try:
            process.wait(_SLICE_S)
            return True
        except subprocess.TimeoutExpired:
            continue
    return False


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process group. The first process of a process namespace takes all others with it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _read(pipe: int) -> bytes:
    os.set_blocking(pipe, False)
    report = b""
    try:
        while len(report) < _MAX_REPORT and (block := os.read(pipe, _MAX_REPORT)):
            report += block
    except BlockingIOError:
        pass  # something that outlived the kill holds the other end; it is not waited for
    return report


def _outcome(report: bytes, secret: bytes, late: bool, returncode: int) -> Outcome:
    head, _, rest = report.partition(b"\n")
    try:
        first = json.loads(head)
    except ValueError:
        first = {"refused": "the interpreter did not start"}
    if not isinstance(first, dict) or "locks" not in first:
        refused = first.get("refused", "") if isinstance(first, dict) else ""
        raise UserError(f"the sandbox cannot be locked ({refused}); no code was run: leave humaneval out here")
    locks = tuple(first["locks"])
    if rest == secret and not late:
        return Outcome("passed", "", locks)
    # 128 + SIGXCPU and the clock are one thing to whoever wrote the program.
    if late or returncode in (-signal.SIGXCPU & 0xFF, (-signal.SIGKILL) & 0xFF):
        return Outcome("timed out", "", locks)
    try:
        message = str(json.loads(rest)["failed"])
    except (ValueError, KeyError, TypeError):
        message = f"the process ended with {returncode} before the program did"
    return Outcome("failed", message, locks)
