"""ARC, the AI2 Reasoning Challenge (Clark et al., 2018): school science, easy and challenge, choices in full text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from warploom.errors import UserError
from warploom.evaluation.config import EvalConfig
from warploom.evaluation.multiple_choice import choice_item, choose, read_items
from warploom.evaluation.task import Item, Record, Task, TaskFiles, require
from warploom.evaluation.text_model import TextModel


class Arc(Task):
    """One of the two parts; part: "easy" or "challenge".

    Rows are AI2's ({"id", "question": {"stem", "choices": [{"text", "label"}]}, "answerKey"}), the hub's ({"id",
    "question", "choices": {"text", "label"}, "answerKey"}), or MosaicML's ({"query", "choices", "gold"}).
    """

    version = "1"

    def __init__(self, part: str) -> None:
        self.name = f"arc_{part}"
        self.files = {
            role: (f"*arc-{part}-{role}*", f"*arc?{part}/*{role}*", *([f"*arc?{part}.*"] if role == "test" else []))
            for role in ("test", "train")
        }

    def items(self, files: TaskFiles, num_shots: int) -> list[Item]:
        return read_items(self, files, num_shots, self._read)

    def answer(self, model: TextModel, items: Sequence[Item], config: EvalConfig) -> Iterator[Record]:
        return choose(model, items)

    def _read(self, row: Any, number: int) -> Item:
        if isinstance(row, dict) and "query" in row:
            question, choices, gold = require(row, self, "query", "choices", "gold")
            return self._item(str(number), question.removeprefix("Question: "), choices, gold)
        id_, question, key = require(row, self, "id", "question", "answerKey")
        if isinstance(question, dict):
            question, listed = require(question, self, "stem", "choices")
            choices, labels = [choice["text"] for choice in listed], [choice["label"] for choice in listed]
        else:
            (listed,) = require(row, self, "choices")
            choices, labels = require(listed, self, "text", "label")
        if key not in labels:
            raise UserError(f"{self.name}, item {id_}: the answer {key!r} is none of the labels {', '.join(labels)}")
        return self._item(str(id_), question, choices, list(labels).index(key))

    def _item(self, id_: str, question: str, choices: Sequence[str], gold: int) -> Item:
        return choice_item(id_, f"Question: {question}\nAnswer:", choices, gold)
