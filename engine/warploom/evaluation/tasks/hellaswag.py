"""HellaSwag (Zellers et al., 2019): which of four endings goes on with a text, on the validation split."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from warploom.evaluation.config import EvalConfig
from warploom.evaluation.multiple_choice import choice_item, choose, read_items
from warploom.evaluation.task import Item, Record, Task, TaskFiles, require
from warploom.evaluation.text_model import TextModel

_SENTENCE_END = re.compile(r"""[.!?]["')]* """)


class HellaSwag(Task):
    """Rows are the authors' or the hub's ({"activity_label", "ctx_a", "ctx_b", "endings", "label"}), or have the
    context whole ({"activity_label", "ctx", "endings", "label"}): then what follows its last sentence is ctx_b."""

    name = "hellaswag"
    version = "1"
    files = {
        "test": ("*hellaswag_val.jsonl*", "*hellaswag*val*full*", "*hellaswag*val*", "*hellaswag.*"),
        "train": ("*hellaswag*train*",),
    }

    def items(self, files: TaskFiles, num_shots: int) -> list[Item]:
        return read_items(self, files, num_shots, self._read)

    def answer(self, model: TextModel, items: Sequence[Item], config: EvalConfig) -> Iterator[Record]:
        return choose(model, items)

    def _read(self, row: Any, number: int) -> Item:
        activity, endings, label = require(row, self, "activity_label", "endings", "label")
        if "ctx_a" in row:
            first, second = require(row, self, "ctx_a", "ctx_b")
        else:
            (context,) = require(row, self, "ctx")
            ends = [found.end() for found in _SENTENCE_END.finditer(context.rstrip())]
            # A context that ends with its sentence has no second part.
            cut = ends[-1] if ends and context.rstrip()[-1] not in ".!?" else len(context)
            first, second = context[:cut].rstrip(), context[cut:]
        prompt = _cleaned(f"{activity}: {first} {second.capitalize()}")
        return choice_item(str(number), prompt, [_cleaned(ending) for ending in endings], int(label))


def _cleaned(text: str) -> str:
    """Take out the marks of WikiHow pages: [header], [title], [step]."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
