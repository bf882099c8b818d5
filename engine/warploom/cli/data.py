"""warploom data: curate raw text into documents and token shards, by a pipeline of steps."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from warploom.curate.audit import homographs
from warploom.curate.classifier import Classifier, accuracy, read_examples
from warploom.curate.provenance import documents_of, seen_mix, trace
from warploom.curate.run import Run, run_task
from warploom.curate.warnings import warnings
from warploom.curate.workers import run_pipeline, slurm_script
from warploom.errors import UserError, nearest


@dataclass(frozen=True)
class RunPipeline:
    """Run a pipeline; what was done before, in this folder, is not done again."""

    pipeline: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PIPELINE")]
    """A .toml file, or a .py file with a function pipeline()."""
    out: Path = Path("curated")
    """Folder of the run: train/, heldout/, tokens/, manifest.json, report.html."""
    workers: Literal["inline", "pool", "ray"] = "pool"
    """Processes of this machine, or tasks of a Ray cluster."""
    num_workers: int = os.cpu_count() or 1
    """How many at once; a Ray cluster with an address decides itself."""
    ray_address: str | None = None
    """A Ray cluster that runs, "auto" or host:port; without it one is started on this machine."""

    def run(self) -> None:
        show = sys.stderr.isatty()

        def progress(phase: str, done: int, total: int) -> None:
            if show:
                print(f"\r{phase} {done}/{total}\x1b[K", end="", file=sys.stderr, flush=True)

        run = run_pipeline(self.pipeline, self.out, self.workers, self.num_workers, progress, self.ray_address)
        if show:
            print("\r\x1b[K", end="", file=sys.stderr)
        print(summary(run))


@dataclass(frozen=True)
class Slurm:
    """Plan a run and print the shell script that submits it to Slurm."""

    pipeline: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PIPELINE")]
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

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    phase: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PHASE")]
    """Name of the phase."""
    index: Annotated[int, tyro.conf.Positional, tyro.conf.arg(metavar="NUMBER")]
    """Number of the task, from 0."""

    def run(self) -> None:
        run_task(str(self.out), self.phase, self.index)


@dataclass(frozen=True)
class Trace:
    """Tell where a training token comes from: file, record, steps."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    token: Annotated[int, tyro.conf.Positional, tyro.conf.arg(metavar="TOKEN")]
    """Number of the token in the shards, from 0."""
    side: Literal["train", "heldout"] = "train"
    """Side of the split."""

    def run(self) -> None:
        origin = trace(self.out, self.token, self.side)
        print(f"file    {origin.file}\nrecord  {origin.record}\nurl     {origin.url or 'none'}")
        print(f"source  {origin.source}, epoch {origin.epoch} of the mix, token {origin.offset} of its document")
        print(f"steps   {', '.join(origin.steps) or 'none'}\nedited  by {', '.join(origin.edits) or 'none'}")


@dataclass(frozen=True)
class Seen:
    """Report the mix that a training run has really seen."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run of the pipeline."""
    samples: Annotated[int, tyro.conf.Positional, tyro.conf.arg(metavar="SAMPLES")]
    """Sequences trained on: steps times the global batch size."""
    seq_len: int
    """The training run's, in tokens."""
    seed: int = 0
    """The training run's."""

    def run(self) -> None:
        for source, share in seen_mix(self.out, self.samples, seq_len=self.seq_len, seed=self.seed).items():
            print(f"{source:<20}{share:>8.2%}")


@dataclass(frozen=True)
class TrainClassifier:
    """Train the model of the step `classifier` on labelled examples, and measure it on a fifth of them."""

    positive: Path
    """A folder or file of examples, or a .csv or .jsonl with labels."""
    negative: Path | None = None
    """Examples of the other class; without it, the other labels of the first file."""
    label: str = ""
    """The label that is the positive class, where one file has both."""
    label_column: str = "label"
    """Column or field of the labels."""
    out: Path = Path("classifier.safetensors")
    """File to write."""

    def run(self) -> None:
        by_label = read_examples(self.positive, self.label_column)
        if self.negative is not None:
            positive = [text for texts in by_label.values() for text in texts]
            negative = [text for texts in read_examples(self.negative, self.label_column).values() for text in texts]
        elif self.label in by_label:
            positive = by_label.pop(self.label)
            negative = [text for texts in by_label.values() for text in texts]
        else:
            raise UserError(f"{self.positive} has no label {self.label!r}{nearest(self.label, by_label)}")
        learnt = [[text for i, text in enumerate(texts) if i % 5] for texts in (positive, negative)]
        tried = Classifier.train(learnt[0], learnt[1])
        figures = accuracy(tried, positive[::5], negative[::5])
        Classifier.train(positive, negative).save(self.out)
        print(f"{self.out}: {len(positive):,} positive and {len(negative):,} negative examples")
        print("on a fifth held out: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))


@dataclass(frozen=True)
class Audit:
    """List the words that the sources of a run use most differently."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a finished run with two sources or more."""
    min_count: int = 50
    """Occurrences that a word needs in each source."""
    top: int = 30
    """Words to list."""

    def run(self) -> None:
        found = homographs(lambda: ((row["source"], row["text"]) for row in documents_of(self.out)), self.min_count)
        print(f"{'word':<20}{'agreement':>10}  occurrences")
        for item in found[: self.top]:
            counts = ", ".join(f"{source} {count:,}" for source, count in item.counts.items())
            print(f"{item.word:<20}{item.agreement:>10.3f}  {counts}")


@dataclass(frozen=True)
class Command:
    """Curate text for training."""

    action: Annotated[
        Annotated[RunPipeline, tyro.conf.subcommand("run")]
        | Annotated[Slurm, tyro.conf.subcommand("slurm")]
        | Annotated[Task, tyro.conf.subcommand("task")]
        | Annotated[Trace, tyro.conf.subcommand("trace")]
        | Annotated[Seen, tyro.conf.subcommand("seen")]
        | Annotated[TrainClassifier, tyro.conf.subcommand("classifier")]
        | Annotated[Audit, tyro.conf.subcommand("audit")],
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
