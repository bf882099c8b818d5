"""How much of the time is useful under faults: `python -m bench.goodput`.

A run of two processes under `warploom launch`, one of which is killed every so often. Useful is the time of the steps
that are in the final weights, by the run's own metrics: forward, backward, exchange, update. Everything else is lost,
and a second table says to what, in shares of the wall time, from the command until all was saved and gone: the start,
up to the end of the first step; the waits after faults, from the strike to the end of the next step; steps that were
made again; saves that steps waited for; and what lies between steps, which is signals and records, and the stop at the
end. There is no evaluation in these runs.
Checkpoints are as far apart as the engine sets them for faults of that frequency (train.fault_every_s), or --save-every
steps. The control, with the checkpoints of the first of the others, has no faults.

--restarts N instead strikes N times, some seconds after steps are being made again. Times are from the strike until the
launcher said so, and until there was a step again; the last column is from SIGTERM until the run was saved and gone.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.faulty_run import FaultyRun
from warploom.data.shards import tokenize_corpus
from warploom.data.stdlib import stdlib_paths
from warploom.train.monitor import METRICS_FILE

_MODEL = {"vocab-size": 512, "d-model": 64, "num-layers": 2, "num-heads": 2, "max-seq-len": 64}


@dataclass(frozen=True)
class Outcome:
    faults: int
    recovered: int
    wall_s: float
    start_s: float  # from the command until there was a step
    steps_s: list[float]  # of each step that was kept
    waited_s: float  # from strikes until there were steps again, or the run was over
    steps_again: int  # that were lost to faults
    saving_s: float  # steps waited for
    saves: int
    known_s: list[float]  # from each strike until the launcher said so
    back_s: list[float]  # and until there was a step again
    stop_s: float  # from SIGTERM at the end until all was saved and gone

    @property
    def goodput(self) -> float:
        return sum(self.steps_s) / self.wall_s

    @property
    def shares(self) -> dict[str, float]:
        """Where the wall time went; they add up to 1."""
        step_s = statistics.median(self.steps_s)
        # The first step is one of the kept, and so is the first after each fault.
        spent = {
            "useful steps": sum(self.steps_s),
            "start": self.start_s - self.steps_s[0],
            "waits after faults": self.waited_s - len(self.back_s) * step_s,
            "steps made again": self.steps_again * step_s,
            "saving": self.saving_s,
        }
        spent["between steps"] = self.wall_s - sum(spent.values())
        return {name: seconds / self.wall_s for name, seconds in spent.items()}


def run(
    folder: Path,
    tokens: Path,
    saves: Sequence[str],
    *,
    seconds: float = 0.0,
    fault_every_s: float = 0.0,
    restarts: int = 0,
    between_s: float = 8.0,
    number: signal.Signals = signal.SIGKILL,
    sequences: int = 16,
) -> Outcome:
    """Train for so many seconds of wall time, with a signal every fault_every_s (0: none) to a process drawn by a fixed
    seed. saves: the flags that say how often to save. restarts: end after so many instead, each kill about between_s
    after there are steps again. sequences: of a step."""
    arguments = [
        *("train", "--data", str(tokens), "--train.out-dir", str(folder / "run"), "--train.steps", "100000000"),
        *(word for name, value in _MODEL.items() for word in (f"--model.{name}", str(value))),
        *("--train.seq-len", "64", "--train.global-batch-size", str(sequences), "--train.micro-batch-size", "8"),
        *(*saves, "--train.eval-every", "1000000000", "--train.keep-best", "0"),
        *("--train.device", "cpu", "--train.threads", "1"),
    ]
    chance = random.Random(0)
    struck_at: list[float] = []
    known_s: list[float] = []
    back_s: list[float] = []
    first_step_at = 0.0
    steps_again = reached = 0
    started, next_fault = time.monotonic(), time.monotonic() + (fault_every_s or float("inf"))
    with FaultyRun(folder, ["--nproc", "2", "--max-restarts", "1000000"], arguments) as running:
        stepping = False
        while True:
            new = running.poll()
            if running.process.poll() is not None:
                raise RuntimeError(f"the run ended by itself:\n{running.log[-3000:]}")
            for event in new:
                if event["event"] == "fault":
                    if len(known_s) == len(struck_at):
                        raise RuntimeError(f"nothing was done to it: {event['sentence']}")
                    known_s.append(event["monotonic_s"] - struck_at[-1])
                    reached = event["step"] or 0
                if event["event"] == "set-up":
                    steps_again += max(0, reached - event["step"])
                if event["event"] == "stepping":
                    stepping = True
                    first_step_at = first_step_at or event["monotonic_s"]
                    if len(back_s) < len(struck_at):
                        back_s.append(event["monotonic_s"] - struck_at[-1])
            now = time.monotonic()
            if restarts and len(back_s) == restarts:
                break
            if not restarts and now - started >= seconds:
                break
            if stepping and (restarts > len(struck_at) or now >= next_fault):
                if restarts:
                    time.sleep(between_s * chance.uniform(0.8, 1.2))
                struck_at.append(running.strike(chance.randrange(2), number))
                next_fault, stepping = max(next_fault + fault_every_s, now), False
            time.sleep(0.01)
        running.process.send_signal(signal.SIGTERM)
        stopping = time.monotonic()
        waited_s = sum(back_s) + (stopping - struck_at[-1] if len(back_s) < len(struck_at) else 0.0)
        if running.process.wait(120) != 128 + signal.SIGTERM:
            raise RuntimeError(f"the run did not end as asked:\n{running.log[-3000:]}")
        stopped = time.monotonic()
        running.poll()
        kinds = [event["kind"] for event in running.of("fault")]
        if kinds != ["frozen" if number == signal.SIGSTOP else "dead"] * len(struck_at):
            raise RuntimeError(f"{len(struck_at)} processes were struck, and found was {kinds}:\n{running.log[-3000:]}")
    lines = (folder / "run" / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    steps, stalls_s = [], []
    for record in map(json.loads, lines):
        if record["kind"] == "step":
            steps.append(record)
        elif record["kind"] == "save":
            stalls_s.append(record["stall_s"])
    if [record["step"] for record in steps] != list(range(1, len(steps) + 1)):
        raise RuntimeError("the metrics do not have each step once")
    if not first_step_at:
        raise RuntimeError(f"there was no step within {stopped - started:.0f} s; give more --minutes")
    return Outcome(
        faults=len(struck_at),
        recovered=len(back_s),
        wall_s=stopped - started,
        start_s=first_step_at - started,
        steps_s=[record["step_s"] for record in steps],
        waited_s=waited_s,
        steps_again=steps_again,
        saving_s=sum(stalls_s),
        saves=len(stalls_s),
        known_s=known_s,
        back_s=back_s,
        stop_s=stopped - stopping,
    )


def line(name: str, outcome: Outcome) -> str:
    return (
        f"| {name} | {outcome.wall_s:.0f} s | {outcome.faults} | {outcome.recovered} | {len(outcome.steps_s):,} | "
        f"{outcome.goodput:.3f} | {_spread(outcome.known_s)} | {_spread(outcome.back_s)} | {outcome.stop_s:.1f} s |"
    )


def shares_line(name: str, outcome: Outcome) -> str:
    step_ms = 1e3 * statistics.median(outcome.steps_s)
    return f"| {name} | {' | '.join(f'{x:.3f}' for x in outcome.shares.values())} | {outcome.saves} | {step_ms:.1f} |"


def _spread(seconds: Sequence[float]) -> str:
    """Median and 95th percentile."""
    ordered = sorted(seconds)
    return f"{statistics.median(ordered):.2f}, {ordered[math.ceil(0.95 * len(ordered)) - 1]:.2f} s" if ordered else "-"


def save_flags(save_every: int, fault_every_s: float) -> list[str]:
    """What makes a run save every so many steps, or, if that is 0, as suits faults of that frequency."""
    if save_every:
        return ["--train.save-every", str(save_every)]
    return ["--train.save-every", "1000000000", "--train.fault-every-s", str(fault_every_s)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.goodput", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="wall time of each run (default: %(default)s)")
    parser.add_argument("--every-s", type=float, nargs="*", default=[60.0, 300.0], help="seconds between faults")
    parser.add_argument("--sequences", type=int, default=16, help="of a step, each of 64 tokens (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=0, help="steps between checkpoints; 0: train.fault_every_s")
    parser.add_argument("--restarts", type=int, default=0, help="measure so many restarts instead")
    parser.add_argument("--signal", choices=["KILL", "STOP"], default="KILL", help="what a process is struck with")
    parser.add_argument("--between-s", type=float, default=8.0, help="--restarts: seconds of steps between kills")
    parser.add_argument("--no-control", action="store_true", help="leave out the run without faults")
    args = parser.parse_args(argv)
    number = signal.Signals[f"SIG{args.signal}"]
    with tempfile.TemporaryDirectory() as scratch:
        tokens = Path(scratch, "tokens")
        tokenize_corpus(stdlib_paths()[:200], tokens, vocab_size=_MODEL["vocab-size"], heldout_fraction=0.05)
        load = os.getloadavg()[0]
        print(f"2 gloo processes, {os.cpu_count()} cores, load average {load:.1f} before the first run\n")
        columns = ["a fault every", "wall", "faults", "recovered", "steps kept", "useful share"]
        columns += ["known: median, p95", "back: median, p95", "stop"]
        print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)
        measure = functools.partial(run, tokens=tokens, number=number, sequences=args.sequences)
        outcomes = {}
        if args.restarts:
            outcomes["restart"] = measure(
                Path(scratch, "restarts"),
                saves=save_flags(args.save_every, args.between_s),
                restarts=args.restarts,
                between_s=args.between_s,
            )
            print(line("restart", outcomes["restart"]), flush=True)
        else:
            for every_s in ([] if args.no_control else [0.0]) + args.every_s:
                name = f"{every_s:.0f} s" if every_s else "never"
                outcomes[name] = measure(
                    Path(scratch, name),
                    saves=save_flags(args.save_every, every_s or args.every_s[0]),
                    seconds=60 * args.minutes,
                    fault_every_s=every_s,
                )
                print(line(name, outcomes[name]), flush=True)
        columns = ["a fault every", *next(iter(outcomes.values())).shares, "saves", "step ms"]
        print(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
        for name, outcome in outcomes.items():
            print(shares_line(name, outcome))
        print(f"\nload average {os.getloadavg()[0]:.1f} after the last run")


if __name__ == "__main__":
    main()
