"""How much of the time is useful under faults: `python -m bench.goodput`.

A run of two processes under `warploom launch`, one of which is killed every so often. Useful is the time of the steps
that are in the final weights, by the run's own metrics; a step that was made again counts once, and what a start, a
checkpoint, a restart or an evaluation takes is lost. The control is the same run without faults. --restarts N instead
strikes N times, some seconds after steps are being made again. Times are from the strike until the launcher said so,
and until there was a step again; the last column is from SIGTERM until the run was saved and gone.
"""

from __future__ import annotations

import argparse
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
    useful_s: float
    steps: int
    known_s: list[float]  # from each strike until the launcher said so
    back_s: list[float]  # and until there was a step again
    stop_s: float  # from SIGTERM at the end until all was saved and gone

    @property
    def goodput(self) -> float:
        return self.useful_s / self.wall_s


def run(
    folder: Path,
    tokens: Path,
    seconds: float,
    fault_every_s: float,
    save_every: int,
    restarts: int = 0,
    between_s: float = 8.0,
    number: signal.Signals = signal.SIGKILL,
) -> Outcome:
    """Train for so many seconds of wall time, with a signal every fault_every_s (0: none) to a process drawn by a fixed
    seed. restarts: end after so many instead, each kill about between_s after there are steps again."""
    arguments = [
        *("train", "--data", str(tokens), "--train.out-dir", str(folder / "run"), "--train.steps", "100000000"),
        *(word for name, value in _MODEL.items() for word in (f"--model.{name}", str(value))),
        *("--train.seq-len", "64", "--train.global-batch-size", "16", "--train.micro-batch-size", "8"),
        *("--train.save-every", str(save_every), "--train.eval-every", "1000000000", "--train.keep-best", "0"),
        *("--train.device", "cpu", "--train.threads", "1"),
    ]
    chance = random.Random(0)
    struck_at: list[float] = []
    known_s: list[float] = []
    back_s: list[float] = []
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
                if event["event"] == "stepping":
                    stepping = True
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
        wall_s = time.monotonic() - started
        running.process.send_signal(signal.SIGTERM)
        stopping = time.monotonic()
        if running.process.wait(120) != 128 + signal.SIGTERM:
            raise RuntimeError(f"the run did not end as asked:\n{running.log[-3000:]}")
        stop_s = time.monotonic() - stopping
        running.poll()
        kinds = [event["kind"] for event in running.of("fault")]
        if kinds != ["frozen" if number == signal.SIGSTOP else "dead"] * len(struck_at):
            raise RuntimeError(f"{len(struck_at)} processes were struck, and found was {kinds}:\n{running.log[-3000:]}")
    steps = [json.loads(line) for line in (folder / "run" / METRICS_FILE).read_text().splitlines()]
    steps = [record for record in steps if record["kind"] == "step"]
    numbers = [record["step"] for record in steps]
    if numbers != list(range(1, len(steps) + 1)):
        raise RuntimeError("the metrics do not have each step once")
    useful_s = sum(record["step_s"] for record in steps)
    return Outcome(len(struck_at), len(back_s), wall_s, useful_s, len(steps), known_s, back_s, stop_s)


def line(name: str, outcome: Outcome) -> str:
    return (
        f"| {name} | {outcome.wall_s:.0f} s | {outcome.faults} | {outcome.recovered} | {outcome.steps:,} | "
        f"{outcome.goodput:.3f} | {_spread(outcome.known_s)} | {_spread(outcome.back_s)} | {outcome.stop_s:.1f} s |"
    )


def _spread(seconds: Sequence[float]) -> str:
    """Median and 95th percentile."""
    ordered = sorted(seconds)
    return f"{statistics.median(ordered):.2f}, {ordered[math.ceil(0.95 * len(ordered)) - 1]:.2f} s" if ordered else "-"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.goodput", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="wall time of each run (default: %(default)s)")
    parser.add_argument("--every-s", type=float, nargs="*", default=[60.0, 300.0], help="seconds between faults")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
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
        if args.restarts:
            outcome = run(
                Path(scratch, "restarts"), tokens, 0.0, 0.0, args.save_every, args.restarts, args.between_s, number
            )
            print(line("restart", outcome), flush=True)
            return
        for every_s in ([] if args.no_control else [0.0]) + args.every_s:
            name = f"{every_s:.0f} s" if every_s else "never"
            outcome = run(Path(scratch, name), tokens, 60 * args.minutes, every_s, args.save_every, number=number)
            print(line(name, outcome), flush=True)
        print(f"\nload average {os.getloadavg()[0]:.1f} after the last run")


if __name__ == "__main__":
    main()
