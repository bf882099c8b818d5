"""GSM8K (Cobbe et al., 2021): sums in words, the answer written out and its last number compared."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from warploom.evaluation.config import EvalConfig
from warploom.evaluation.multiple_choice import record
from warploom.evaluation.task import Item, Record, Task, TaskFiles, first_shots, require, with_shots
from warploom.evaluation.text_model import TextModel
from warploom.generate.distribution import SamplingConfig

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = re.compile(r"(?s).*#### |[,$]|\.$")


class GSM8K(Task):
    """strict: the first number after "####", as the examples have it. flexible: the last number of the answer.

    Rows: {"question", "answer"}, the answer ending in "#### number".
    """

    name = "gsm8k"
    version = "3"
    num_shots = 5
    files = {role: (f"*gsm8k/*{role}*", f"*gsm8k*{role}*") for role in ("test", "train")}

    def items(self, files: TaskFiles, num_shots: int) -> list[Item]:
        shots = []
        if num_shots:
            examples = [f"{question} {answer}" for question, answer in self._rows(files, "train")]
            shots = first_shots(examples, num_shots, self)
        return [
            Item(str(number), with_shots(shots, question), {"gold": number_in(answer)})
            for number, (question, answer) in enumerate(self._rows(files, "test"))
        ]

    def answer(self, model: TextModel, items: Sequence[Item], config: EvalConfig) -> Iterator[Record]:
        sampling = SamplingConfig(
            temperature=0.0,
            stop=("Question:", "</s>", "<|im_end|>"),
            max_new_tokens=config.max_new_tokens or 256,
        )
        for number, (text,), cut in model.complete([item.prompt for item in items], sampling):
            item = items[number]
            found = {"strict": strict_answer(text), "flexible": flexible_answer(text)}
            gold = item.values["gold"]
            flags = [f"no {name} answer" for name, answer in found.items() if answer is None]
            yield record(
                item,
                {name: float(answer is not None and number_in(answer) == gold) for name, answer in found.items()},
                [*flags, *(["prompt cut"] if cut else [])],
                gold=gold,
                answer=text,
                found=found,
            )

    def settings(self, config: EvalConfig) -> dict[str, Any]:
        return {"max_new_tokens": config.max_new_tokens or 256}

    def _rows(self, files: TaskFiles, role: str) -> Iterator[tuple[str, str]]:
        for _, row in files.rows(self, role):
            question, answer = require(row, self, "question", "answer")
            yield f"Question: {question}\nAnswer:", answer


def strict_answer(text: str) -> str | None:
    found = _STRICT.search(text)
    return None if found is None else found[1].strip()


def flexible_answer(text: str) -> str | None:
    found = list(_FLEXIBLE.finditer(text))
    return (found[-1][1] or found[-1][2]).strip() if found else None


def number_in(text: str) -> str:
    """What is compared: without all up to "#### ", thousands separators, dollar signs, a full stop at the end."""
    return _IGNORED.sub("", text).lower()
