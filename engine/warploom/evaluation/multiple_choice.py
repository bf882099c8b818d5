"""Multiple choice by likelihood: every choice is scored as a continuation of the question, none is generated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from warploom.evaluation.likelihood import Likelihood
from warploom.evaluation.task import Item, Record, Task, TaskFiles, first_shots, with_shots
from warploom.evaluation.text_model import TextModel


def choice_item(id_: str, prompt: str, choices: Sequence[str], gold: int, group: str = "") -> Item:
    """Make an item of choose; choices come without the space that is put before each."""
    return Item(id_, prompt, {"choices": list(choices), "gold": gold}, group)


def read_items(task: Task, files: TaskFiles, num_shots: int, read: Callable[[Any, int], Item]) -> list[Item]:
    """Make an item of each test row, with the first num_shots rows of the training split and their answers before it.

    read: (row, its number) -> an item of choice_item.
    """
    shots: list[str] = []
    if num_shots:
        rows = (read(row, number) for number, (_, row) in enumerate(files.rows(task, "train")))
        examples = [f"{item.prompt} {item.values['choices'][item.values['gold']]}" for item in rows]
        shots = first_shots(examples, num_shots, task)
    items = [read(row, number) for number, (_, row) in enumerate(files.rows(task, "test"))]
    return [replace(item, prompt=with_shots(shots, item.prompt)) for item in items]


def choice_likelihoods(model: TextModel, items: Sequence[Item]) -> Iterator[tuple[Item, list[Likelihood]]]:
    """Yield each item with the likelihoods of its choices, " " before each, as soon as all of them are there."""
    pairs = [(item.prompt, f" {choice}") for item in items for choice in item.values["choices"]]
    owners = [(n, place) for n, item in enumerate(items) for place in range(len(item.values["choices"]))]
    found: list[dict[int, Likelihood]] = [{} for _ in items]
    for pair, likelihood in model.log_likelihoods(pairs):
        n, place = owners[pair]
        found[n][place] = likelihood
        if len(found[n]) == len(items[n].values["choices"]):
            yield items[n], [found[n][choice] for choice in range(len(found[n]))]


def choose(model: TextModel, items: Sequence[Item]) -> Iterator[Record]:
    """Yield the record of each item, with acc, acc_norm and acc_bytes."""
    for item, likelihoods in choice_likelihoods(model, items):
        choices, gold = item.values["choices"], item.values["gold"]
        log_probs = [one.log_prob for one in likelihoods]
        yield record(
            item,
            {name: float(choice == gold) for name, choice in chosen(choices, log_probs).items()},
            choices=choices,
            gold=gold,
            log_probs=log_probs,
        )


def chosen(choices: Sequence[str], log_probs: Sequence[float]) -> dict[str, int]:
    """The choice that each rule takes, by name of its figure; of equals the first.

    acc: the highest log-probability. acc_norm: per character of the choice. acc_bytes: per byte of UTF-8. The space
    before the choice is scored, and not counted in its length.
    """
    scores = np.asarray(log_probs)
    return {
        "acc": int(scores.argmax()),
        "acc_norm": int((scores / [max(1, len(choice)) for choice in choices]).argmax()),
        "acc_bytes": int((scores / [max(1, len(choice.encode("utf-8"))) for choice in choices]).argmax()),
    }


def record(item: Item, scores: dict[str, float], flags: Sequence[str] = (), **answer: Any) -> Record:
    """Put together the record of an item; answer: what the model said and what was wanted."""
    return {
        "id": item.id,
        "group": item.group,
        "scores": scores,
        "flags": list(flags),
        "prompt": item.prompt,
        **answer,
    }
