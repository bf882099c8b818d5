"""A process of `warploom launch`: imports what runs need, waits for its orders, and becomes the verb they name."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import sys
from pathlib import Path

from warploom.cli.main import main
from warploom.parallel.heartbeat import beating

# Imported before anything is asked for, in processes that have nothing else to do.
_NEEDED = ("warploom.cli.train", "warploom.parallel.apply", "warploom.parallel.mesh", "warploom.train.trainer")


def run() -> int:
    for name in _NEEDED:
        importlib.import_module(name)
    line = sys.stdin.readline()
    if not line:
        return 0  # the launcher is gone
    orders = json.loads(line)
    os.environ.update(orders["environment"])
    faulthandler.register(signal.SIGUSR1)
    path, num_slots, slot = orders["heartbeat"]
    with beating(Path(path), num_slots, slot):
        return main(orders["arguments"])


if __name__ == "__main__":
    code = run()
    # All is written and closed. Taking down an interpreter with these imports takes 2 s of a processor and more, which
    # who asked a run to stop would wait for.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
