"""What was measured on a card, in one JSON file for each card and kind of choice. Imports no Triton."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "warploom" / "tuned"


def tuned_file(kind: str, index: int = 0) -> Path:
    """The file of this card. kind: kernels (their configurations) or backends (of the ops)."""
    card = re.sub(r"\W+", "-", torch.cuda.get_device_name(index)).strip("-").lower()
    return FOLDER / f"{card}.{kind}.json"


def read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        entries = None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        warnings.warn(f"{path} is damaged, so what it held is not used; run `warploom tune` again", stacklevel=2)
        return {}
    return entries


def write(path: Path, entries: Mapping[str, Any]) -> None:
    """Two processes may write at once: each writes a file of its own and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    mine = path.with_suffix(f".{os.getpid()}")
    mine.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    mine.replace(path)
