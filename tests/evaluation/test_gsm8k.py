"""GSM8K: prompts, and what counts as the answer in a text."""

import json

import pytest

from warploom.evaluation.config import EvalConfig
from warploom.evaluation.task import TaskFiles
from warploom.evaluation.tasks import TASKS
from warploom.evaluation.tasks.gsm8k import flexible_answer, number_in, strict_answer


class Scripted:
    """Answers each prompt with the text that a table has for its last question."""

    def __init__(self, texts):
        self.texts = texts

    def complete(self, prompts, sampling, *, names=None, end_id=None):
        for number, prompt in enumerate(prompts):
            yield number, [self.texts[prompt.rsplit("Question: ", 1)[1].removesuffix("\nAnswer:")]], False


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    rows = [{"question": f"q{n}", "answer": f"<<1+{n}={n + 1}>>so\n#### 1,00{n}"} for n in range(6)]
    for split in ("train", "test"):
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("it is 4.\n#### 1,234", "1,234", "1,234"),
        ("#### -5 and then #### 6", "-5", "6"),
        ("it costs $18.50 in all.", None, "$18.50"),
        ("the answer is 7", None, "7"),
        ("no number", None, None),
        ("####7", None, "7"),
    ],
)
def test_answers_are_found(text, strict, flexible):
    assert (strict_answer(text), flexible_answer(text)) == (strict, flexible)


def test_numbers_are_compared_without_what_is_around_them():
    assert number_in("so\n#### 1,234") == number_in("$1234.") == "1234"
    assert number_in("1234.0") != "1234"  # as text: the benchmark compares no values


def test_prompts_and_scores(folder):
    task = TASKS["gsm8k"]
    items = task.items(TaskFiles([folder]), 2)
    assert items[3].prompt == (
        "Question: q0\nAnswer: <<1+0=1>>so\n#### 1,000\n\nQuestion: q1\nAnswer: <<1+1=2>>so\n#### 1,001\n\n"
        "Question: q3\nAnswer:"
    )
    texts = {
        "q0": " so #### 1000",
        "q1": " it is 1,001.",
        "q2": " #### 5 or 1002",
        "q3": " none",
        "q4": "",
        "q5": " #### 7",
    }
    records = {record["id"]: record for record in task.answer(Scripted(texts), items, EvalConfig())}
    scores = [(records[str(n)]["scores"]["strict"], records[str(n)]["scores"]["flexible"]) for n in range(6)]
    assert scores == [(1, 1), (0, 1), (0, 1), (0, 0), (0, 0), (0, 0)]
    assert records["1"]["flags"] == ["no strict answer"]
    assert records["3"]["flags"] == ["no strict answer", "no flexible answer"]


def test_the_official_files(shared_data):
    items = TASKS["gsm8k"].items(TaskFiles([shared_data / "eval"]), 5)
    assert len(items) == 1319 and items[0].prompt.count("#### ") == 5
    assert items[0].values["gold"] == "18"
