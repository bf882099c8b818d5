"""warploom data: curate raw text into documents and token shards, by a pipeline of steps."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from warploom.curate.run import Run, run_task
from warploom.curate.warnings import warnings
from warploom.curate.workers import run_pipeline, slurm_script


@dataclass(frozen=True)
class RunPipeline:
    """Run a pipeline; what was done before, in this folder, is not done again."""

    pipeline: Annotated[Path, tyro.conf.Positional]
    """A .toml file, or a .py file with a function pipeline()."""
    out: Path = Path("curated")
    """Folder of the run: train/, heldout/, tokens/, manifest.json, report.html."""
    workers: Literal["inline", "pool", "ray"] = "pool"
    """Processes of this machine, or tasks of a Ray cluster."""
    num_workers: int = os.cpu_count() or 1
    """How many at once."""

    def run(self) -> None:
        show = sys.stderr.isatty()

        def progress(phase: str, done: int, total: int) -> None:
            if show:
                print(f"\r{phase} {done}/{total}\x1b[K", end="", file=sys.stderr, flush=True)

        run = run_pipeline(self.pipeline, self.out, self.workers, self.num_workers, progress)
        if show:
            print("\r\x1b[K", end="", file=sys.stderr)
        print(summary(run))


@dataclass(frozen=True)
class Slurm:
    """Plan a run and print the shell script that submits it to Slurm."""

    pipeline: Annotated[Path, tyro.conf.Positional]
    """A .toml file, or a .py file with a function pipeline()."""
    out: Path = Path("curated")
    """Folder of the run, on a file system that all nodes see."""
    options: str = ""
    """Options of every sbatch call, such as "--partition=cpu --time=2:00:00"."""

    def run(self) -> None:
        print(slurm_script(Run.prepare(self.pipeline, self.out), self.options), end="")


@dataclass(frozen=True)
class Task:
    """Do one task of a phase: what the jobs of the Slurm script call."""

    out: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    phase: Annotated[str, tyro.conf.Positional]
    """Name of the phase."""
    index: Annotated[int, tyro.conf.Positional]
    """Number of the task, from 0."""

    def run(self) -> None:
        run_task(str(self.out), self.phase, self.index)


@dataclass(frozen=True)
class Command:
    """Curate text for training."""

    action: Annotated[
        Annotated[RunPipeline, tyro.conf.subcommand("run")]
        | Annotated[Slurm, tyro.conf.subcommand("slurm")]
        | Annotated[Task, tyro.conf.subcommand("task")],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> None:
        self.action.run()


def summary(run: Run) -> str:
    """The funnel and the warnings of a finished run, one line each."""
    manifest = run.manifest()
    lines = [f"{'step':<18}{'documents':>10}{'dropped':>10}{'MB in':>10}{'CPU s':>8}"]
    for entry in manifest["funnel"]:
        lines.append(
            f"{entry['step']:<18}{entry['documents_in']:>10,}{entry['documents_dropped']:>10,}"
            f"{entry['bytes_in'] / 1e6:>10,.2f}{entry['seconds']:>8.2f}"
        )
    for source, sides in manifest["sources"].items():
        kept = {side: counts for side, counts in sides.items() if side != "dropped"}
        lines.append(
            f"{source}: "
            + ", ".join(f"{side} {c['documents']:,} documents, {c['bytes'] / 1e6:,.2f} MB" for side, c in kept.items())
        )
    if manifest["mix"]:
        lines.append(f"tokens: {manifest['mix']['tokens']:,} in {run.folder / 'tokens'}")
    lines += [f"WARNING: {text}" for text in warnings(manifest)]
    lines.append(f"report: {run.folder / 'report.html'}")
    return "\n".join(lines)
