"""What a process of `warploom launch` does: it becomes the verb that its orders name."""

from __future__ import annotations

import faulthandler
import importlib
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from warploom.cli.main import main
from warploom.parallel.heartbeat import beating

_NEEDED = ("warploom.cli.train", "warploom.parallel.apply", "warploom.parallel.mesh", "warploom.train.trainer")


def prepare() -> None:
    """Import what runs need, before any of them is forked."""
    for name in _NEEDED:
        importlib.import_module(name)


def run(orders: Mapping[str, Any]) -> int:
    os.environ.update(orders["environment"])
    faulthandler.register(signal.SIGUSR1)
    path, num_slots, slot = orders["heartbeat"]
    with beating(Path(path), num_slots, slot):
        return main(orders["arguments"])
