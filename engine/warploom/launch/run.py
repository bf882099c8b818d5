"""launch: one machine's part of a run of many processes, from the rendezvous to the exit code."""

from __future__ import annotations

import json
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from warploom.errors import UserError
from warploom.launch.agent import POLL_EVERY_S, Agent, Note
from warploom.launch.processes import Processes
from warploom.launch.watch import WatchConfig
from warploom.parallel.fork_server import Run
from warploom.parallel.heartbeat import HeartbeatFile


@dataclass(frozen=True)
class LaunchConfig:
    """How many processes, and what to do when one fails."""

    nproc: int = 1
    """Processes on this machine."""
    max_restarts: int = 3
    """Start all processes again, from the last checkpoint, so many times after one died, froze or got stuck."""
    nnodes: int = 1
    """Machines; each runs this command with the same nnodes, rendezvous and run_id."""
    rendezvous: str = "localhost:0"
    """Where the machines meet: host:port of one of them."""
    run_id: str = ""
    """Name of the run at the rendezvous; needed for more than one machine."""
    events: Path | None = None
    """Write what happens to the processes into this file, a JSON object a line."""
    watch: WatchConfig = field(default_factory=WatchConfig)

    def __post_init__(self) -> None:
        for name, least in (("nproc", 1), ("nnodes", 1), ("max_restarts", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; give {least} or more")
        if self.nnodes > 1 and (not self.run_id or self.rendezvous == LaunchConfig.rendezvous):
            raise UserError(
                f"nnodes is {self.nnodes}: give all machines the same run_id, and as rendezvous the host:port of one"
            )


def launch(config: LaunchConfig, arguments: Sequence[str], run: Run) -> int:
    """Run arguments, a verb of warploom and its flags, in config.nproc processes, each of which ends with run(its
    orders). Return the exit code: that of the verb, 128 + signal if one stopped the run, 1 if no restart was left.

    Call from the main thread, before there are others, and with everything imported that run needs.
    """
    processes = Processes(run)
    handler = get_rendezvous_handler(
        RendezvousParameters(
            backend="c10d",
            endpoint=config.rendezvous,
            run_id=config.run_id or uuid.uuid4().hex,
            min_nodes=config.nnodes,
            max_nodes=config.nnodes,
        )
    )
    spec = WorkerSpec(
        role="warploom",
        local_world_size=config.nproc,
        rdzv_handler=handler,
        entrypoint=sys.executable,
        max_restarts=config.max_restarts,
        monitor_interval=POLL_EVERY_S,
    )
    with ExitStack() as stack:
        stack.callback(processes.close)
        stack.callback(handler.shutdown)
        agent = Agent(
            spec,
            arguments,
            processes,
            stack.enter_context(HeartbeatFile.temporary(config.nproc)),
            config.watch,
            note=stack.enter_context(_notes(config.events)),
            say=_say,
        )
        stack.enter_context(_signals_to(agent.stop))
        try:
            agent.run()
        except RendezvousError as error:
            raise UserError(f"the machines did not meet at {config.rendezvous}: {error}") from error
    return agent.exit_code


def _say(sentence: str) -> None:
    print(f"warploom launch: {sentence}", file=sys.stderr, flush=True)


@contextmanager
def _notes(path: Path | None) -> Iterator[Note]:
    if path is None:
        yield lambda event, **values: None
        return
    with path.open("a", encoding="utf-8") as file:

        def note(event: str, **values: Any) -> None:
            # The steady clock is one for all processes of a machine.
            file.write(json.dumps({"event": event, "monotonic_s": time.monotonic(), **values}) + "\n")
            file.flush()

        yield note


@contextmanager
def _signals_to(stop: Callable[[signal.Signals], None]) -> Iterator[None]:
    def received(number: int, frame: FrameType | None) -> None:
        stop(signal.Signals(number))

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, received) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
