"""What the processes of a run are forked from: a process that has imported what they need, and does nothing else.

Imports take seconds of a processor, for every process and every start again; a fork takes milliseconds, and its memory
is shared until it is written to.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

Run = Callable[[Mapping[str, Any]], int]


def start(run: Run) -> tuple[int, int, int]:
    """Fork the server, in a session of its own; return its process id, a file descriptor for orders and one for
    reports.

    Each line of orders, a JSON object, has it fork a process that ends with exit code run(orders). JSON lines of
    reports say the "pid" of each, in the order of the lines, and later its "code", negative for a signal. It ends when
    the orders are closed. The caller should have no threads yet, and must not have used a GPU.
    """
    orders_to, orders = os.pipe()
    reports, reports_from = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(orders_to)
        os.close(reports_from)
        return pid, orders, reports
    try:
        # A Ctrl-C at the terminal reaches the launcher alone, which passes it on once.
        os.setsid()
        os.close(orders)
        os.close(reports)
        _serve(run, orders_to, reports_from)
    finally:
        _end(1)


def _serve(run: Run, orders: int, reports: int) -> NoReturn:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # the launcher may have its own
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake)

    def report(**values: int) -> None:
        os.write(reports, json.dumps(values).encode() + b"\n")

    def fork(order: Mapping[str, Any]) -> None:
        pid = os.fork()
        if pid:
            report(pid=pid)
            return
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for fd in (ended, wake, orders, reports):
            os.close(fd)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        _become(run, order)

    received = b""
    while True:
        ready, _, _ = select.select([orders, ended], [], [])
        if ended in ready:
            os.read(ended, 1 << 16)
            while (found := _ended_child()) is not None:
                report(pid=found[0], code=found[1])
        if orders in ready:
            data = os.read(orders, 1 << 16)
            if not data:
                os._exit(0)  # the launcher is gone, which the forks see by their parent
            *lines, received = (received + data).split(b"\n")
            for line in lines:
                fork(json.loads(line))


def _ended_child() -> tuple[int, int] | None:
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, os.waitstatus_to_exitcode(status)) if pid else None


def _become(run: Run, order: Mapping[str, Any]) -> NoReturn:
    code = 1
    try:
        code = run(order)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        _end(code)


def _end(code: int) -> NoReturn:
    """End a fork, saying the error that it ends with: what called fork() is not to go on in it."""
    if sys.exc_info()[0] is not None:
        traceback.print_exc()
    # All is written and closed. Taking down an interpreter with these imports takes 2 s of a processor and more, which
    # who asked a run to stop would wait for.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
