"""FolderLock: one process at a time writes a folder, a run's or an evaluation's."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

from warploom.checkpoint.save import make_run_folder
from warploom.errors import UserError

LOCK = ".lock"


class FolderLock:
    """Hold folder/.lock for the length of a with block; entering creates the folder if it is missing.

    kind: what sort of folder it is, as errors call it.

    The kernel holds the lock (flock) and frees it when the holder dies, however it dies, so none is ever stale. The
    file holds the holder's process id and is never deleted: a deleted lock file could be locked twice.
    Entering raises UserError if another process holds the lock (naming it), or if the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], kind: str = "run folder") -> None:
        self.path = Path(folder, LOCK)
        self._kind = kind
        self._fd: int | None = None

    def __enter__(self) -> FolderLock:
        try:
            make_run_folder(self.path.parent)
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UserError(
                f"the {self._kind} {self.path.parent} cannot be written: {error.strerror}; choose another folder"
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.truncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode(errors="replace") or "unknown"
            os.close(fd)
            raise UserError(
                f"the {self._kind} {self.path.parent} is in use by process {holder}; stop it or choose another folder"
            ) from None
        except OSError as error:
            os.close(fd)
            raise UserError(f"{self.path} cannot be locked: {error.strerror}; choose another folder") from error
        self._fd = fd
        # A forked child shares the lock and would hold it on when its parent is killed.
        os.register_at_fork(after_in_child=self._close)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
