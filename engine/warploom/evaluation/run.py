"""Benchmarks of one model: read the items, ask the model what is not answered yet, write the figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import xxhash

from warploom.checkpoint.lock import FolderLock
from warploom.errors import UserError, nearest
from warploom.evaluation.config import EvalConfig
from warploom.evaluation.results import ResultsFolder
from warploom.evaluation.task import Item, Record, Task, TaskFiles
from warploom.evaluation.tasks import TASKS
from warploom.evaluation.text_model import TextModel, text_model
from warploom.train.load_model import LoadedModel, base_record


def find_tasks(names: Sequence[str]) -> list[Task]:
    """Return the tasks of these names. Raises UserError for one that is not known."""
    for name in names:
        if name not in TASKS:
            raise UserError(f"there is no task {name!r}{nearest(name, TASKS)}")
    return [TASKS[name] for name in dict.fromkeys(names)]


def read_task(task: Task, files: TaskFiles, config: EvalConfig) -> list[Item]:
    """Read the items that config asks for. Raises UserError if it lacks what the task needs."""
    task.check(config)
    items = task.items(files, task.num_shots if config.shots is None else config.shots)
    if config.limit is None:
        return items
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.group if task.is_limited_by_group else "", []).append(item)
    return [item for group in groups.values() for item in islice(group, config.limit)]


def evaluate_tasks(
    loaded: LoadedModel,
    tasks: Sequence[Task],
    data: Sequence[str | Path],
    out: Path,
    config: EvalConfig | None = None,
    *,
    on_progress: Callable[[str, int, int], None] = lambda task, done, total: None,
    on_figures: Callable[[str, dict[str, Any]], None] = lambda task, summary: None,
) -> dict[str, dict[str, Any]]:
    """Evaluate a checkpoint and return its summaries (results.summarise) by task; out is its results folder.

    Items that out already has answers for are not asked again. on_progress(task, items answered, items) is called as
    answers come, on_figures(task, summary) when a task is done. All files are read before the model is asked.
    Raises UserError for missing files, if out holds results of another model or of other settings, and if another
    evaluation is writing there.
    """
    config = EvalConfig() if config is None else config
    files = TaskFiles(data)
    items = {task.name: read_task(task, files, config) for task in tasks}
    with FolderLock(out, "results folder"):
        folder = ResultsFolder(
            out,
            {
                "checkpoint": str(loaded.path),
                "step": loaded.step,
                "weights": base_record(loaded.path)["weights"],
                "dtype": config.dtype,
            },
        )
        dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
        template = loaded.chat_template
        model = text_model(
            loaded.model, loaded.tokenizer, dtype=dtype, batch_size=config.batch_size, chat_template=template
        )
        summaries = {}
        for task in tasks:
            settings = task_settings(task, files, config)
            records = _answer(task, items[task.name], model, config, folder, settings, on_progress)
            summaries[task.name] = folder.finish(task.name, settings, records)
            on_figures(task.name, summaries[task.name])
        return summaries


def task_settings(task: Task, files: TaskFiles, config: EvalConfig) -> dict[str, Any]:
    """What the answers to an item depend on, beside the model."""
    roles = [role for role in task.files if role == "test" or files.find(task, role)]
    return {
        "version": task.version,
        "shots": task.num_shots if config.shots is None else config.shots,
        "files": {file.name: _hash(file) for role in roles for file in files.find(task, role)},
        **task.settings(config),
    }


def _answer(
    task: Task,
    items: list[Item],
    model: TextModel,
    config: EvalConfig,
    folder: ResultsFolder,
    settings: dict[str, Any],
    on_progress: Callable[[str, int, int], None],
) -> list[Record]:
    answered = folder.records(task.name, settings)
    missing = [item for item in items if item.id not in answered]
    with folder.appending(task.name) as write, torch.no_grad():
        on_progress(task.name, len(items) - len(missing), len(items))
        for item in items:
            finished = task.finish(answered[item.id], item, config) if item.id in answered else None
            if finished is not None:
                write(finished)
                answered[item.id] = finished
        for number, record in enumerate(task.answer(model, missing, config), start=1 + len(items) - len(missing)):
            write(record)
            answered[record["id"]] = record
            on_progress(task.name, number, len(items))
    return [answered[item.id] for item in items]


def _hash(file: Path) -> str:
    """xxh3-128 of a file."""
    digest = xxhash.xxh3_128()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
