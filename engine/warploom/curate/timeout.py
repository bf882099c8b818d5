"""TimeLimited: a function run in a process of its own, which is killed and replaced when it takes too long."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
from collections.abc import Callable


class TimeLimited:
    """Calls function(text) -> text in a child process; None if it took longer than timeout_s or the child died."""

    def __init__(self, function: Callable[[str], str], timeout_s: float):
        self._function, self._timeout_s = function, timeout_s
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: multiprocessing.connection.Connection | None = None

    def __call__(self, text: str) -> str | None:
        if self._process is None:
            self._start()
        assert self._pipe is not None
        try:
            self._pipe.send_bytes(text.encode("utf-8", "surrogatepass"))
            if self._pipe.poll(self._timeout_s):
                return self._pipe.recv_bytes().decode("utf-8", "surrogatepass")
        except (EOFError, OSError):
            pass  # the child died over this page: same as too long
        self.close()
        return None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._function), daemon=True)
        self._process.start()
        theirs.close()

    def close(self) -> None:
        """End the child; the next call starts another."""
        if self._process is not None and self._pipe is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process.close()
        self._process = self._pipe = None


def _serve(pipe: multiprocessing.connection.Connection, function: Callable[[str], str]) -> None:
    try:
        while True:
            text = pipe.recv_bytes().decode("utf-8", "surrogatepass")
            pipe.send_bytes(function(text).encode("utf-8", "surrogatepass"))
    except (EOFError, OSError):
        return  # the parent is gone
