"""The elastic agent of one machine: torch's rendezvous and restarts, over processes that are watched.

torch's own LocalElasticAgent polls exit codes alone, waits up to half a minute for the processes around a dead one, and
lets every restart meet in the store where the keys of the dead incarnation still lie.
"""

from __future__ import annotations

import dataclasses
import signal
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.distributed.elastic.agent.server import RunResult, SimpleElasticAgent, WorkerGroup, WorkerSpec, WorkerState

from warploom.launch.processes import Processes
from warploom.launch.watch import Finding, Watch, WatchConfig
from warploom.parallel.heartbeat import HeartbeatFile

POLL_EVERY_S = 0.1
ASK_AFTER_S = 0.3
"""A scheduler may signal all processes of a job, and each needs that only once."""
STOP_WITHIN_S = 30.0
"""After a signal to stop, what still runs then is killed."""
FINAL = (2, 128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes after which nothing is started again: what a person must mend, and a signal to the process itself."""
FINAL_WITHIN_S = 5.0
"""All processes come to such an end, and the one that says why may be the last."""
_INCARNATION = "warploom/incarnation"

Note = Callable[..., None]


class Agent(SimpleElasticAgent):
    """Runs arguments (of the `warploom` command) in spec.local_world_size processes until all have ended well.

    note(event, **values) is told what happens; say(sentence) what a person should read. exit_code is that of the run
    once `run` has returned.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        arguments: Sequence[str],
        processes: Processes,
        heartbeats: HeartbeatFile,
        watch: WatchConfig,
        *,
        note: Note,
        say: Callable[[str], None],
    ) -> None:
        super().__init__(spec)
        self.exit_code = 0
        self._arguments, self._processes, self._heartbeats = list(arguments), processes, heartbeats
        self._watch_config, self._note, self._say = watch, note, say
        self._watch = Watch(watch, spec.local_world_size)
        self._first_step: int | None = None
        self._is_stepping = False
        self._stop_signal: signal.Signals | None = None
        self._stop_at = 0.0
        self._asked = False

    def stop(self, number: signal.Signals) -> None:
        """Ask the run to stop, as a signal asks one process; a second time ends it at once."""
        if self._stop_signal is not None:
            self._processes.signal(signal.SIGKILL)
            return
        self._stop_signal, self._stop_at = number, time.monotonic()
        self._asked = False

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        spec, store = worker_group.spec, worker_group.store
        assert store is not None
        # One name for this start on all machines. The store of a round is new, what processes put into the one below
        # it is not: with the name before their keys, no start sees those of another.
        if worker_group.group_rank == 0:
            store.set(_INCARNATION, uuid.uuid4().hex)
        incarnation = store.get(_INCARNATION).decode()
        self._attempt = spec.max_restarts - self._remaining_restarts
        self._heartbeats.clear()
        orders = [
            {
                "arguments": self._arguments,
                "environment": _environment(worker_group, worker, incarnation, self._attempt),
                "heartbeat": [str(self._heartbeats.path), self._heartbeats.num_slots, worker.local_rank],
            }
            for worker in worker_group.workers
        ]
        self._processes.start(orders)
        self._watch = Watch(self._watch_config, len(orders), worker_group.workers[0].global_rank)
        self._first_step, self._is_stepping = None, False
        self._asked = False
        self._note("start", attempt=self._attempt, pids=self._processes.pids)
        return dict(enumerate(self._processes.pids))

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._processes.kill()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        self._processes.kill()

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        codes = self._processes.exit_codes()
        if self._stop_signal is not None:
            return self._stopping(codes, worker_group)
        readings = [self._heartbeats.read(slot) for slot in range(self._heartbeats.num_slots)]
        finding = self._watch.poll(time.monotonic(), readings, codes, self._processes.pids)
        if finding is None:
            self._look_for_steps(readings[0].step)
            return _ended(worker_group) if len(codes) == len(readings) else RunResult(state=WorkerState.HEALTHY)
        return self._found(finding)

    def _stopping(self, codes: Mapping[int, int], worker_group: WorkerGroup) -> RunResult:
        assert self._stop_signal is not None
        if len(codes) < self._heartbeats.num_slots:
            since_s = time.monotonic() - self._stop_at
            if not self._asked and since_s > ASK_AFTER_S:
                # One is enough, they tell each other.
                self._asked = True
                if not any(self._heartbeats.read(slot).signals for slot in range(self._heartbeats.num_slots)):
                    self._processes.signal(self._stop_signal)
            if since_s > STOP_WITHIN_S:
                self._say(f"some processes still ran {STOP_WITHIN_S:.0f} s after the signal, and were killed")
                self._processes.kill()
                self.exit_code = 1
                return _ended(worker_group)
            return RunResult(state=WorkerState.HEALTHY)
        # Each says it was stopped, or was done before; anything else went wrong on the way.
        stopped = 128 + self._stop_signal
        self.exit_code = next((code for code in codes.values() if code not in (0, stopped)), max(codes.values()))
        if self.exit_code < 0:
            self.exit_code = 128 - self.exit_code
        self._note("stopped", exit_code=self.exit_code)
        return _ended(worker_group)

    def _found(self, finding: Finding) -> RunResult:
        self._note("fault", step=self._heartbeats.read(0).step, **dataclasses.asdict(finding))
        if finding.kind != "dead":
            # The Python stack of every process, on its standard error; one that was stopped cannot, until it goes on.
            self._processes.signal(signal.SIGUSR1)
            time.sleep(0.5)
        is_final = finding.exit_code in FINAL
        if is_final:
            self._processes.wait(FINAL_WITHIN_S)
        # Killed, not asked: without one of them the others cannot save.
        self._processes.signal(signal.SIGKILL)
        if is_final:
            self.exit_code = finding.exit_code or 0
            self._remaining_restarts = 0
        elif self._remaining_restarts == 0:
            self.exit_code = 1
            self._say(f"{finding.sentence}; no restart is left of {self._worker_group.spec.max_restarts}")
        else:
            restart = self._worker_group.spec.max_restarts - self._remaining_restarts + 1
            self._say(f"{finding.sentence}; restart {restart} of {self._worker_group.spec.max_restarts}")
        return RunResult(state=WorkerState.FAILED if finding.kind == "dead" else WorkerState.UNHEALTHY)

    def _look_for_steps(self, step: int | None) -> None:
        """Note when the run has set up, and when it has done a step since."""
        if step is None or self._is_stepping:
            return
        if self._first_step is None:
            self._first_step = step
            self._note("set-up", step=step)
        if step > self._first_step:
            self._is_stepping = True
            self._note("stepping", step=step)


def _ended(worker_group: WorkerGroup) -> RunResult:
    """What the base class takes for the end of a run that is not to be started again."""
    return RunResult(
        state=WorkerState.SUCCEEDED, return_values={worker.global_rank: None for worker in worker_group.workers}
    )


def _environment(worker_group: WorkerGroup, worker: Any, incarnation: str, attempt: int) -> dict[str, str]:
    """Return what torchrun puts into the environment of a process."""
    spec = worker_group.spec
    return {
        "RANK": str(worker.global_rank),
        "LOCAL_RANK": str(worker.local_rank),
        "WORLD_SIZE": str(worker.world_size),
        "LOCAL_WORLD_SIZE": str(spec.local_world_size),
        "GROUP_RANK": str(worker_group.group_rank),
        "GROUP_WORLD_SIZE": str(worker_group.group_world_size),
        "MASTER_ADDR": str(worker_group.master_addr),
        "MASTER_PORT": str(worker_group.master_port),
        "TORCHELASTIC_RUN_ID": f"{spec.rdzv_handler.get_run_id()}/{incarnation}",
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        "TORCHELASTIC_MAX_RESTARTS": str(spec.max_restarts),
        "TORCHELASTIC_USE_AGENT_STORE": str(spec.rdzv_handler.use_agent_store),
    }
