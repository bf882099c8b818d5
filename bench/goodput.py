"""How much of the time is useful under faults: `python -m bench.goodput`.

A run of two processes under `warploom launch`, one of which is killed every so often. Useful is the time of the steps
that are in the final weights, by the run's own metrics; a step that was made again counts once, and what a start, a
checkpoint, a restart or an evaluation takes is lost. The control is the same run without faults. --restarts N instead
kills N times, some seconds after steps are being made again, and prints how long it took to come back.
"""

from __future__ import annotations

import argparse
import json
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
    back_s: list[float]  # from each kill to the next step

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
) -> Outcome:
    """Train for so many seconds of wall time, with a SIGKILL every fault_every_s (0: none) to a process drawn by a
    fixed seed. restarts: end after so many instead, each kill about between_s after there are steps again."""
    arguments = [
        *("train", "--data", str(tokens), "--train.out-dir", str(folder / "run"), "--train.steps", "100000000"),
        *(word for name, value in _MODEL.items() for word in (f"--model.{name}", str(value))),
        *("--train.seq-len", "64", "--train.global-batch-size", "16", "--train.micro-batch-size", "8"),
        *("--train.save-every", str(save_every), "--train.eval-every", "1000000000", "--train.keep-best", "0"),
        *("--train.device", "cpu", "--train.threads", "1"),
    ]
    chance = random.Random(0)
    killed_at: list[float] = []
    back_s: list[float] = []
    started, next_fault = time.monotonic(), time.monotonic() + (fault_every_s or float("inf"))
    with FaultyRun(folder, ["--nproc", "2", "--max-restarts", "1000000"], arguments) as running:
        stepping = False
        while True:
            new = running.poll()
            if running.process.poll() is not None:
                raise RuntimeError(f"the run ended by itself:\n{running.log[-3000:]}")
            for event in new:
                if event["event"] == "stepping":
                    stepping = True
                    if len(back_s) < len(killed_at):
                        back_s.append(event["monotonic_s"] - killed_at[-1])
            now = time.monotonic()
            if restarts and len(back_s) == restarts:
                break
            if not restarts and now - started >= seconds:
                break
            if stepping and (restarts > len(killed_at) or now >= next_fault):
                if restarts:
                    time.sleep(between_s * chance.uniform(0.8, 1.2))
                killed_at.append(running.strike(chance.randrange(2), signal.SIGKILL))
                next_fault, stepping = max(next_fault + fault_every_s, now), False
            time.sleep(0.01)
        wall_s = time.monotonic() - started
        running.process.send_signal(signal.SIGTERM)
        if running.process.wait(120) != 128 + signal.SIGTERM:
            raise RuntimeError(f"the run did not end as asked:\n{running.log[-3000:]}")
        running.poll()
        deaths = [event for event in running.of("fault") if event["exit_code"] == -signal.SIGKILL]
        if len(deaths) != len(killed_at):
            raise RuntimeError(f"{len(killed_at)} processes were killed and {len(deaths)} found dead:\n{running.log}")
    steps = [json.loads(line) for line in (folder / "run" / METRICS_FILE).read_text().splitlines()]
    steps = [record for record in steps if record["kind"] == "step"]
    numbers = [record["step"] for record in steps]
    if numbers != list(range(1, len(steps) + 1)):
        raise RuntimeError("the metrics do not have each step once")
    return Outcome(len(killed_at), len(back_s), wall_s, sum(record["step_s"] for record in steps), len(steps), back_s)


def line(name: str, outcome: Outcome) -> str:
    back = sorted(outcome.back_s)
    p95 = f"{back[min(len(back) - 1, int(0.95 * len(back)))]:.2f} s" if back else "-"
    median = f"{statistics.median(back):.2f} s" if back else "-"
    return (
        f"| {name} | {outcome.wall_s:.0f} s | {outcome.faults} | {outcome.recovered} | {outcome.steps:,} | "
        f"{outcome.goodput:.3f} | {median} | {p95} |"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.goodput", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="wall time of each run (default: %(default)s)")
    parser.add_argument("--every-s", type=float, nargs="*", default=[60.0, 300.0], help="seconds between faults")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--restarts", type=int, default=0, help="measure so many restarts instead")
    parser.add_argument("--between-s", type=float, default=8.0, help="--restarts: seconds of steps between kills")
    parser.add_argument("--no-control", action="store_true", help="leave out the run without faults")
    args = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        tokens = Path(scratch, "tokens")
        tokenize_corpus(stdlib_paths()[:200], tokens, vocab_size=_MODEL["vocab-size"], heldout_fraction=0.05)
        load = os.getloadavg()[0]
        print(f"2 gloo processes, {os.cpu_count()} cores, load average {load:.1f} before the first run\n")
        print("| a fault every | wall | faults | recovered | steps kept | useful share | back: median | p95 |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        if args.restarts:
            outcome = run(Path(scratch, "restarts"), tokens, 0.0, 0.0, args.save_every, args.restarts, args.between_s)
            print(line("restart", outcome), flush=True)
            return
        for every_s in ([] if args.no_control else [0.0]) + args.every_s:
            name = f"{every_s:.0f} s" if every_s else "never"
            outcome = run(Path(scratch, name), tokens, 60 * args.minutes, every_s, args.save_every)
            print(line(name, outcome), flush=True)
        print(f"\nload average {os.getloadavg()[0]:.1f} after the last run")


if __name__ == "__main__":
    main()
