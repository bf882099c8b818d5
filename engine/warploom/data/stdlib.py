"""The built-in corpus: the Python standard library of the running interpreter, code and English, nothing to download.

Ten megabytes and more in some seven hundred files; its tests are left out, since much in them is generated or broken
on purpose.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

from warploom.errors import UserError

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def stdlib_paths() -> list[Path]:
    """List the .py files of the standard library, sorted. Raises UserError if this interpreter keeps it elsewhere."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if _LEFT_OUT.isdisjoint(path.relative_to(root).parts[:-1]) and path.stat().st_size
    ]
    if not files:
        raise UserError(f"this interpreter has no standard library source in {root}; name a corpus of your own as data")
    return files
