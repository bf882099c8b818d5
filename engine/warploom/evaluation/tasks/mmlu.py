"""MMLU (Hendrycks et al., 2021): 57 subjects, four lettered choices, five examples of the subject before each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import PurePath

from warploom.errors import UserError
from warploom.evaluation.config import EvalConfig
from warploom.evaluation.multiple_choice import choice_item, choose
from warploom.evaluation.task import Item, Record, Task, TaskFiles, first_shots, require, with_shots
from warploom.evaluation.text_model import TextModel

LETTERS = "ABCD"


class MMLU(Task):
    """Files are the authors' CSV (question, four choices, letter), <split>/<subject>_<split>.csv, in a tar or not; or
    rows of the hub ({"question", "subject", "choices", "answer": a number}). An item's group is its subject."""

    name = "mmlu"
    version = "1"
    num_shots = 5
    is_limited_by_group = True
    files = {
        role: (f"*mmlu*/{role}/*.csv", f"*mmlu*/*{role}*.parquet", f"*mmlu*/*{role}/*.arrow", "*mmlu*.tar*")
        for role in ("test", "dev")
    }

    def items(self, files: TaskFiles, num_shots: int) -> list[Item]:
        shots: dict[str, list[str]] = defaultdict(list)
        if num_shots:
            for subject, prompt, _, gold in self._rows(files, "dev"):
                shots[subject].append(f"{prompt} {LETTERS[gold]}")
        items: list[Item] = []
        numbers: dict[str, int] = defaultdict(int)
        for subject, prompt, choices, gold in self._rows(files, "test"):
            examples = first_shots(shots[subject], num_shots, self)
            about = subject.replace("_", " ")
            head = f"The following are multiple choice questions (with answers) about {about}.\n\n"
            items.append(
                choice_item(
                    f"{subject}/{numbers[subject]}",
                    head + with_shots(examples, prompt),
                    LETTERS[: len(choices)],
                    gold,
                    subject,
                )
            )
            numbers[subject] += 1
        return items

    def answer(self, model: TextModel, items: Sequence[Item], config: EvalConfig) -> Iterator[Record]:
        return choose(model, items)

    def _rows(self, files: TaskFiles, role: str) -> Iterator[tuple[str, str, list[str], int]]:
        """Yield (subject, question with its choices, choices, index of the right one)."""
        found = False
        for name, row in files.rows(self, role):
            path = PurePath(name)
            if isinstance(row, list):
                if path.parent.name != role:
                    continue
                subject = path.name.split(".")[0].removesuffix(f"_{role}")
                if len(row) != 6 or row[5] not in LETTERS:
                    raise UserError(f"{name}: a row of MMLU is a question, 4 choices and a letter, got {row!r:.80}")
                question, choices, gold = row[0], row[1:5], LETTERS.index(row[5])
            else:
                subject, question, choices, gold = require(row, self, "subject", "question", "choices", "answer")
            found = True
            lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)]
            yield subject, "\n".join([question.strip(), *lines, "Answer:"]), list(choices), int(gold)
        if not found:
            raise UserError(f"the files of mmlu hold no folder {role}; see docs/evaluation.md for their form")
