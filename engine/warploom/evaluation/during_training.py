"""Benchmarks while a model is trained: few items, by likelihood alone, so that an evaluation costs seconds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from warploom.data.tokenizer import Tokenizer
from warploom.errors import UserError
from warploom.evaluation.config import EvalConfig
from warploom.evaluation.figures import figures_of
from warploom.evaluation.run import find_tasks, read_task
from warploom.evaluation.task import Item, Task, TaskFiles
from warploom.evaluation.text_model import TextModel
from warploom.models.transformer import Transformer

CHEAP = ("arc_easy", "arc_challenge", "hellaswag", "mmlu", "truthfulqa")


@dataclass(frozen=True)
class TasksDuringTraining:
    """Call it with the model: scores by "task/figure". Items are the first of each task, the same every time."""

    tasks: Sequence[tuple[Task, list[Item]]]

    @classmethod
    def read(cls, names: Sequence[str], data: Sequence[str | Path], num_items: int) -> TasksDuringTraining:
        """Read num_items of each task (of each subject of MMLU). Raises UserError for tasks that are not by likelihood,
        and for missing files."""
        for task in find_tasks(names):
            if task.name not in CHEAP:
                raise UserError(f"{task.name} writes text, which is slow in training; take some of {', '.join(CHEAP)}")
        files, config = TaskFiles(data), EvalConfig(limit=num_items)
        return cls([(task, read_task(task, files, config)) for task in find_tasks(names)])

    @torch.no_grad()
    def __call__(self, model: Transformer, tokenizer: Tokenizer) -> dict[str, float]:
        scores: dict[str, float] = {}
        with _as_it_was(model):
            asked = TextModel(model.eval(), tokenizer)
            for task, items in self.tasks:
                figures = figures_of(list(task.answer(asked, items, EvalConfig())))
                scores |= {f"{task.name}/{name}": figure.value for name, figure in figures.items()}
        return scores


@contextlib.contextmanager
def _as_it_was(model: Transformer) -> Iterator[None]:
    was_training = model.training
    try:
        yield
    finally:
        model.train(was_training)
