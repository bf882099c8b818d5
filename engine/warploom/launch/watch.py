"""Whether the processes of a run are well: what their exit codes and heartbeats say, and one sentence if they are not.

Dead: the process ended. Frozen: its pulse stopped, so its interpreter does not run (a stop signal, a call that holds
the interpreter's lock). Stuck: it has a pulse, and the run makes no progress (a deadlock, a collective that one process
never comes to).
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from warploom.errors import UserError
from warploom.parallel.heartbeat import Reading

_LONGEST_POLL_S = 0.5


@dataclass(frozen=True)
class WatchConfig:
    frozen_s: float = 3.0
    """Seconds without a pulse after which a process counts as frozen; 0 never does."""
    frozen_first_s: float = 30.0
    """The same limit while it sets up and for the first step and evaluation: imports hold the interpreter."""
    stuck_s: float = 4.0
    """Seconds without progress in steps and evaluations after which the run counts as stuck, or stuck_factor times the
    longest pause so far if that is more; 0 never does."""
    stuck_factor: float = 20.0
    """How much longer than any before it a pause may be."""
    patience_s: float = 900.0
    """The same limit for what has no usual length: start, set-up, the first step and evaluation, checkpoints."""

    def __post_init__(self) -> None:
        for name in ("frozen_s", "frozen_first_s", "stuck_s", "stuck_factor", "patience_s"):
            if not getattr(self, name) >= 0:
                raise UserError(f"watch.{name} is {getattr(self, name)}; give 0 or more")


@dataclass(frozen=True)
class Finding:
    """What is wrong with the processes."""

    kind: Literal["dead", "frozen", "stuck"]
    ranks: tuple[int, ...]
    sentence: str
    exit_code: int | None = None
    """Of a dead process; negative for a signal, as subprocess has it."""


class Watch:
    """Looks at the processes of one machine, of which first_rank is the first, from their start on.

    Silence is counted in polls, each for half a second at most, so that a machine or launcher that itself stood still
    raises no alarm.
    """

    def __init__(self, config: WatchConfig, num_processes: int, first_rank: int = 0) -> None:
        self._config, self._first_rank = config, first_rank
        self._before: list[Reading | None] = [None] * num_processes
        self._silent_s = [0.0] * num_processes
        self._still_s = 0.0
        self._longest_pause_s = 0.0  # from begin to end in phases of usual length
        self._was_usual = False
        self._polled_at: float | None = None

    def poll(
        self, now: float, readings: Sequence[Reading], exit_codes: Mapping[int, int], pids: Sequence[int]
    ) -> Finding | None:
        """Return what is wrong. now: seconds of a steady clock. exit_codes: of the processes that have ended, by their
        place here; those that ended well are no finding."""
        passed_s = 0.0 if self._polled_at is None else min(now - self._polled_at, _LONGEST_POLL_S)
        self._polled_at = now
        bad = {place: code for place, code in exit_codes.items() if code}
        if bad:
            return self._dead(bad, readings, pids)
        running = [place for place in range(len(readings)) if place not in exit_codes]
        moved = False
        for place in running:
            before, reading = self._before[place], readings[place]
            self._silent_s[place] += passed_s
            # Before the first pulse a process imports what it needs, which has the limit of its phase.
            if before is None or reading.pulse != before.pulse or not reading.pulse:
                self._silent_s[place] = 0.0
            moved = moved or before is None or reading.reports != before.reports
        usual = not any(readings[place].is_patient for place in running)
        if moved:
            if usual and self._was_usual:
                self._longest_pause_s = max(self._longest_pause_s, self._still_s)
            self._still_s = 0.0
        else:
            self._still_s += passed_s
        self._before, self._was_usual = list(readings), usual
        return self._frozen(running, readings, pids) or self._stuck(running, readings, usual)

    def _dead(self, bad: Mapping[int, int], readings: Sequence[Reading], pids: Sequence[int]) -> Finding:
        # A process that is killed takes others with it, which end with an error of their own about the connection.
        killed = [place for place, code in bad.items() if code < 0]
        place = min(killed or bad)
        code = bad[place]
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        sentence = f"rank {self._rank(place)} (process {pids[place]}) {how} {readings[place]}"
        return Finding("dead", (self._rank(place),), sentence, code)

    def _frozen(self, running: Sequence[int], readings: Sequence[Reading], pids: Sequence[int]) -> Finding | None:
        frozen = []
        for place in running:
            limit = self._config.frozen_first_s if readings[place].is_first else self._config.frozen_s
            if limit and self._silent_s[place] >= limit:
                frozen.append(place)
        if not frozen:
            return None
        sentence = "; ".join(
            f"rank {self._rank(place)} (process {pids[place]}) is frozen: no pulse for {self._silent_s[place]:.1f} s, "
            f"{readings[place]}"
            for place in frozen
        )
        return Finding("frozen", tuple(map(self._rank, frozen)), sentence)

    def _stuck(self, running: Sequence[int], readings: Sequence[Reading], usual: bool) -> Finding | None:
        config = self._config
        limit = max(config.stuck_s, config.stuck_factor * self._longest_pause_s) if usual else config.patience_s
        if not running or not config.stuck_s or not limit or self._still_s < limit:
            return None
        # Who waits in a collective has begun more of them than who does not come to it. Pipeline stages differ in
        # their number anyhow, so all are named, the likely one first.
        order = sorted(running, key=lambda place: (readings[place].step or 0, readings[place].collectives))
        behind = [p for p in order if readings[p].collectives == readings[order[0]].collectives]
        sentence = f"no progress for {self._still_s:.1f} s: " + "; ".join(
            f"rank {self._rank(place)} is {readings[place]}" for place in order
        )
        return Finding("stuck", tuple(map(self._rank, behind)), sentence)

    def _rank(self, place: int) -> int:
        return self._first_rank + place
