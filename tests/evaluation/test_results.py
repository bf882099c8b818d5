"""`warploom eval --tasks` on small models: figures, records, going on after an interruption, what is refused."""

import json

import pytest

from warploom.checkpoint.lock import LOCK, FolderLock
from warploom.cli.main import main
from warploom.errors import UserError
from warploom.evaluation.config import EvalConfig
from warploom.evaluation.run import evaluate_tasks, find_tasks
from warploom.train.load_model import load_model

NAMES = ["arc_easy", "hellaswag", "mmlu", "truthfulqa"]


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint(max_seq_len=1024)


@pytest.fixture(scope="module")
def evaluated(checkpoint, task_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("eval")
    argv = ["eval", str(checkpoint), "--tasks", ",".join(NAMES), "--data", str(task_folder), "--out", str(out)]
    assert main(argv) == 0
    return out / "run-step-00000007"


def records(folder, task):
    head, *lines = [json.loads(line) for line in (folder / f"{task}.jsonl").read_text("utf-8").splitlines()]
    return head, lines


def test_every_figure_is_the_mean_of_the_records(evaluated):
    results = json.loads((evaluated / "results.json").read_text())
    assert list(results) == NAMES
    figures = {"arc_easy": 3, "hellaswag": 3, "mmlu": 3, "truthfulqa": 2}
    for task, count in figures.items():
        head, lines = records(evaluated, task)
        assert head["settings"]["files"] and results[task]["num_items"] == len(lines)
        assert len(results[task]["figures"]) == count
        for name, figure in results[task]["figures"].items():
            scores = [line["scores"][name] for line in lines]
            assert figure["value"] == pytest.approx(sum(scores) / len(scores)) and figure["stderr"] is not None
    assert set(results["mmlu"]["groups"]) == {"logic", "plant_science"}
    assert results["mmlu"]["figures"]["acc"]["clustered_stderr"] is not None


def test_a_record_holds_what_was_asked_and_said(evaluated):
    _, lines = records(evaluated, "arc_easy")
    line = next(line for line in lines if line["id"] == "q0")
    assert line["prompt"] == "Question: what is plant 0?\nAnswer:" and line["choices"] == ["the sun", "a leaf", "green"]
    best = max(range(3), key=lambda n: line["log_probs"][n])
    assert line["gold"] == 0 and line["scores"]["acc"] == float(best == 0)


def test_what_is_answered_is_not_asked_again(evaluated, checkpoint, task_folder, tmp_path, monkeypatch):
    """An interruption leaves some records, and a cut line; the rest is answered, and the figures are the same."""
    out = tmp_path / "eval" / evaluated.name
    out.mkdir(parents=True)
    (out / "settings.json").write_bytes((evaluated / "settings.json").read_bytes())
    lines = (evaluated / "mmlu.jsonl").read_bytes().splitlines(keepends=True)
    (out / "mmlu.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:20])
    asked = []
    task = find_tasks(["mmlu"])[0]
    answer = type(task).answer
    monkeypatch.setattr(
        type(task),
        "answer",
        lambda self, model, items, config: asked.extend(items) or answer(self, model, items, config),
    )
    summaries = evaluate_tasks(load_model(checkpoint), [task], [task_folder], out)
    assert len(asked) == 8 - 3
    before = json.loads((evaluated / "results.json").read_text())["mmlu"]
    assert summaries["mmlu"]["figures"]["acc"]["value"] == before["figures"]["acc"]["value"]
    assert len(records(out, "mmlu")[1]) == 8


def test_results_of_other_models_and_settings_are_not_mixed(evaluated, make_checkpoint, checkpoint, task_folder):
    tasks = find_tasks(["arc_easy"])
    other = load_model(make_checkpoint("other", seed=1, max_seq_len=1024))
    with pytest.raises(UserError, match="holds results with weights"):
        evaluate_tasks(other, tasks, [task_folder], evaluated)
    with pytest.raises(UserError, match="holds answers with shots 0, and now it is 1"):
        evaluate_tasks(load_model(checkpoint), tasks, [task_folder], evaluated, EvalConfig(shots=1))


def test_two_evaluations_do_not_write_one_folder(evaluated, checkpoint, task_folder):
    """The second is refused before it touches a file, and the first one's records stay whole."""
    before = {file.name: file.read_bytes() for file in evaluated.iterdir() if file.name != LOCK}
    with FolderLock(evaluated), pytest.raises(UserError, match=f"the results folder {evaluated} is in use by process"):
        evaluate_tasks(load_model(checkpoint), find_tasks(["arc_easy"]), [task_folder], evaluated)
    assert {file.name: file.read_bytes() for file in evaluated.iterdir() if file.name != LOCK} == before
    evaluate_tasks(load_model(checkpoint), find_tasks(["arc_easy"]), [task_folder], evaluated)


def test_a_limit_is_one_of_each_subject(checkpoint, task_folder, tmp_path):
    config = EvalConfig(limit=2)
    found = evaluate_tasks(load_model(checkpoint), find_tasks(["mmlu", "arc_easy"]), [task_folder], tmp_path, config)
    assert (found["mmlu"]["num_items"], found["arc_easy"]["num_items"]) == (4, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--tasks", "arc"], "there is no task 'arc'"),
        (["--tasks", "arc_easy", "--limit", "0"], "limit is 0"),
        (["--tasks", "arc_challenge"], "no test file of arc_challenge"),
    ],
)
def test_mistakes_are_one_sentence(checkpoint, task_folder, tmp_path, capsys, changes, message):
    assert main(["eval", str(checkpoint), "--data", str(task_folder), "--out", str(tmp_path), *changes]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert main(["eval", str(checkpoint), "--tasks", "arc_easy"]) == 2
    assert "--data" in capsys.readouterr().err
