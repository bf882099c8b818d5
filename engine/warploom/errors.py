"""UserError: what a person can mend. Raised by configuration, files and commands; shown in one line, exit code 2. And
what goes wrong between the processes of a run."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class UserError(Exception):
    """One clear sentence: what is wrong, the offending value, the way out."""


class ProcessLost(Exception):
    """Another process of the run is gone; this one is well, and can only end too. Exit code 75: try again."""


class CollectiveMismatch(Exception):
    """Processes of a run came to different collectives: an error in the program that runs on them."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which of the known names was meant, "; did you mean 'a'?", or list them all if none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(word) for word in close) + "?"
    return "; known: " + ", ".join(known)


def optional(module: str, extra: str) -> ModuleType:
    """Import a library that only some uses need, or raise UserError naming the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"this needs {module.split('.')[0]}: pip install 'warploom[{extra}]' ({error})") from error
