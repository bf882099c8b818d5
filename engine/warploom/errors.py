"""UserError: what a person can mend. Raised by configuration, files and commands; shown in one line, exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """One clear sentence: what is wrong, the offending value, the way out."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which of the known names was meant, "; did you mean 'a'?", or list them all if none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(word) for word in close) + "?"
    return "; known: " + ", ".join(known)
