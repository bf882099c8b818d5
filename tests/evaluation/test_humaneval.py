"""HumanEval: the official solutions pass in the sandbox, others do not, and nothing runs unasked."""

import pytest

from warploom.data.task_files import read_rows
from warploom.errors import UserError
from warploom.evaluation.config import EvalConfig
from warploom.evaluation.run import read_task
from warploom.evaluation.task import TaskFiles
from warploom.evaluation.tasks import TASKS


class Scripted:
    def __init__(self, texts):
        self.texts = texts

    def complete(self, prompts, sampling, *, names=None, end_id=None):
        for number, prompt in enumerate(prompts):
            yield number, self.texts[prompt][: sampling.num_samples], False


def test_code_runs_only_where_it_is_allowed(shared_data):
    files = TaskFiles([shared_data / "eval" / "humaneval"])
    with pytest.raises(UserError, match="--allow-code-execution"):
        read_task(TASKS["humaneval"], files, EvalConfig())
    assert len(read_task(TASKS["humaneval"], files, EvalConfig(allow_code_execution=True))) == 164


def solutions(shared_data):
    (file,) = (shared_data / "eval" / "humaneval").glob("*.jsonl.gz")
    return {row["prompt"]: row["canonical_solution"] for _, row in read_rows(file)}


def test_pass_at_k_of_right_and_wrong_programs(shared_data):
    task, official = TASKS["humaneval"], solutions(shared_data)
    items = task.items(TaskFiles([shared_data / "eval"]), 0)[:2]
    texts = {
        prompt: ["    return None\n", text, "    raise SystemExit(0)\n", text] for prompt, text in official.items()
    }
    config = EvalConfig(samples=4, allow_code_execution=True)
    for record in task.answer(Scripted(texts), items, config):
        assert [outcome["status"] for outcome in record["outcomes"]] == ["failed", "passed", "failed", "passed"]
        assert record["scores"] == {"pass@1": 0.5, "pass@2": pytest.approx(1 - 1 / 6), "pass@4": 1.0}
        assert "audit hook" in record["isolation"]


@pytest.mark.slow
def test_every_official_solution_passes(shared_data):
    task, official = TASKS["humaneval"], solutions(shared_data)
    items = task.items(TaskFiles([shared_data / "eval"]), 0)
    texts = {prompt: [text] for prompt, text in official.items()}
    records = list(task.answer(Scripted(texts), items, EvalConfig(allow_code_execution=True)))
    assert [(record["id"], record["outcomes"]) for record in records if record["scores"]["pass@1"] != 1] == []
    assert len(records) == 164
