"""Benchmarks at each evaluation of a run: recorded, in the report, and without a trace in what is trained."""

import json

import pytest
import torch

from warploom.cli.main import main
from warploom.errors import UserError
from warploom.evaluation.config import EvalConfig
from warploom.evaluation.during_training import TasksDuringTraining
from warploom.evaluation.run import evaluate_tasks, find_tasks
from warploom.train.load_model import load_model

SMALL = [
    *("--model.vocab-size", "300", "--model.d-model", "32", "--model.num-layers", "1", "--model.num-heads", "2"),
    *("--model.max-seq-len", "64", "--train.seq-len", "32", "--train.global-batch-size", "4", "--train.steps", "4"),
    *("--train.micro-batch-size", "4", "--train.eval-every", "2", "--train.device", "cpu"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"the leaf of plant {number} is green in the sun. " * 20)
    return folder


def test_scores_are_recorded_and_change_nothing(text, task_folder, tmp_path):
    tasks = ["--tasks", "arc_easy,truthfulqa", "--task-data", str(task_folder), "--task-items", "3"]
    for name, flags in (("with", tasks), ("without", [])):
        assert main(["train", "--data", str(text), "--train.out-dir", str(tmp_path / name), *SMALL, *flags]) == 0
    lines = [json.loads(line) for line in (tmp_path / "with" / "metrics.jsonl").read_text().splitlines()]
    scores = [line["scores"] for line in lines if line["kind"] == "eval"]
    assert len(scores) == 2
    assert set(scores[0]) == {
        "arc_easy/acc",
        "arc_easy/acc_norm",
        "arc_easy/acc_bytes",
        "truthfulqa/mc1",
        "truthfulqa/mc2",
    }
    assert "arc_easy/acc_norm" in (tmp_path / "with" / "report.html").read_text("utf-8")
    weights = [load_model(tmp_path / name).model.state_dict() for name in ("with", "without")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=0)
    # The last evaluation is that of the weights that were saved.
    loaded = load_model(tmp_path / "with")
    found = evaluate_tasks(loaded, find_tasks(["truthfulqa"]), [task_folder], tmp_path / "eval", EvalConfig(limit=3))
    assert scores[-1]["truthfulqa/mc2"] == pytest.approx(found["truthfulqa"]["figures"]["mc2"]["value"], abs=1e-5)


def test_what_is_slow_or_missing_is_refused(text, task_folder, capsys):
    with pytest.raises(UserError, match="gsm8k writes text"):
        TasksDuringTraining.read(["gsm8k"], [task_folder], 3)
    assert main(["train", "--data", str(text), *SMALL, "--tasks", "arc_easy"]) == 2
    assert "--task-data" in capsys.readouterr().err
