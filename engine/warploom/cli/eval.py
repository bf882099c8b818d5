"""`warploom eval`: held-out loss, perplexity and bits per byte of checkpoints, or their scores on benchmarks."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import Progress, TaskID

from warploom.errors import UserError
from warploom.evaluation.compare import PAGE, write_comparison
from warploom.evaluation.config import EvalConfig
from warploom.evaluation.perplexity import evaluate
from warploom.evaluation.run import evaluate_tasks, find_tasks
from warploom.train.device import choose_device
from warploom.train.load_model import LoadedModel, load_model


@dataclass(frozen=True)
class Command:
    """Measure models on text they were not trained on, or, with --tasks, on benchmarks, compared on one page."""

    checkpoint: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[CHECKPOINT ...]")]
    """step-... folders, or run folders, whose newest sound checkpoint is taken."""
    tasks: tuple[str, ...] = ()
    """Benchmarks, separated by commas or spaces; docs/evaluation.md says which there are and what their files are."""
    data: tuple[str, ...] = ()
    """Without tasks: files, folders or globs of text, all of which is measured, or one folder made by `warploom
    tokenize`, of which the held-out split is; left out, the held-out split of the run's own text. With tasks: folders
    of task files, and task=PATH for a task whose files lie elsewhere."""
    out: Path = Path("eval")
    """tasks: where results go, a folder for each checkpoint; what is there already is not computed again."""
    compare: tuple[Path, ...] = ()
    """Results folders of earlier evaluations, to stand on the page of this one, or on one of their own."""
    seq_len: int | None = None
    """Text: tokens the model may look back at most; None takes the length it was trained with."""
    base: Path | None = None
    """The base of an adapter, where it is no longer where it was."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    config: Annotated[EvalConfig, tyro.conf.arg(name="")] = field(default_factory=EvalConfig)

    def run(self) -> None:
        if not self.checkpoint and not self.compare:
            raise UserError("no checkpoint was given; name one or more")
        if self.threads:
            torch.set_num_threads(self.threads)
        names = [name for words in self.tasks for name in words.split(",") if name]
        tasks = find_tasks(names)
        if self.compare and not (self.checkpoint and tasks):
            if self.checkpoint:
                raise UserError("compare puts results of tasks side by side; name tasks for the checkpoint, too")
            self.out.mkdir(parents=True, exist_ok=True)
            print(f"comparison: {write_comparison(self.compare, self.out / PAGE)}")
            return
        if not tasks:
            for checkpoint in self.checkpoint:
                self._measure_text(self._load(checkpoint))
            return
        if not self.data:
            raise UserError("tasks need their files; name the folder that holds them with --data")
        folders = []
        for checkpoint in self.checkpoint:
            loaded = self._load(checkpoint)
            folder = self.out / label(loaded)
            print(f"{loaded.path} -> {folder}")
            with TaskProgress() as progress:
                evaluate_tasks(
                    loaded, tasks, self.data, folder, self.config, on_progress=progress.show, on_figures=progress.done
                )
            folders.append(folder)
        print(f"comparison: {write_comparison([*folders, *self.compare], self.out / PAGE)}")

    def _load(self, checkpoint: Path) -> LoadedModel:
        return load_model(
            checkpoint,
            device=choose_device(self.device),
            base=self.base,
            on_skip=lambda text: print(text, file=sys.stderr),
        )

    def _measure_text(self, loaded: LoadedModel) -> None:
        found = evaluate(loaded, self.data, seq_len=self.seq_len, batch_size=self.config.batch_size)
        print(f"checkpoint     {loaded.path} (step {loaded.step:,})")
        print(f"measured on    {found.num_targets:,} tokens, {found.num_bytes:,} bytes of text")
        print(f"loss           {found.loss:.4f} nats per token")
        print(f"perplexity     {found.perplexity:.3f}")
        print(f"bits per byte  {found.bits_per_byte:.4f}")


class TaskProgress:
    """A bar per task while it is answered, on standard error, and its figures when it is done."""

    def __init__(self) -> None:
        self._progress = Progress(console=Console(stderr=True), transient=True)
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> TaskProgress:
        return self  # it starts with the first answer: what is refused before is one line, as everywhere

    def __exit__(self, *error: object) -> None:
        if self._bars:
            self._progress.stop()

    def show(self, task: str, done: int, total: int) -> None:
        if task not in self._bars:
            self._progress.start()
            self._bars[task] = self._progress.add_task(task, total=total)
        self._progress.update(self._bars[task], completed=done)

    def done(self, task: str, summary: dict[str, Any]) -> None:
        for line in figure_lines(task, summary):
            print(line, flush=True)


def label(loaded: LoadedModel) -> str:
    """The name of a checkpoint among others: its run and its step."""
    return f"{loaded.path.resolve().parent.name}-{loaded.path.name}"


def figure_lines(task: str, summary: dict[str, Any]) -> list[str]:
    """A line per figure, and one for what has to be said of the items."""
    lines = []
    for name, figure in summary["figures"].items():
        error = "" if figure["stderr"] is None else f" +- {figure['stderr']:.4f}"
        if figure["clustered_stderr"] is not None:
            error += f" ({figure['clustered_stderr']:.4f} by group)"
        lines.append(f"{task:<16}{name:<22}{figure['value']:>9.4f}{error}  n = {figure['num_items']:,}")
    lines += [
        f"{task:<16}{flag:<22}{count:>9,} of {summary['num_items']:,}" for flag, count in summary["flags"].items()
    ]
    return lines
