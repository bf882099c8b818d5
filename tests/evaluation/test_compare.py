"""The page that compares models: paired differences, what it warns of, and that it shows text as text."""

import re

import pytest

from warploom.cli.main import main
from warploom.evaluation.compare import write_comparison
from warploom.evaluation.results import ResultsFolder


@pytest.fixture
def results(tmp_path):
    """Make the results folder of a model from the scores of its items."""

    def make(name, scores, shots=0, prompt="what?"):
        settings = {"shots": shots}
        (tmp_path / name).mkdir()
        folder = ResultsFolder(tmp_path / name, {"weights": name, "dtype": "fp32"})
        folder.records("arc_easy", settings)
        records = [
            {
                "id": str(n), "group": "", "flags": ["prompt cut"] if n == 0 else [], "prompt": prompt, "gold": 0,
                "choices": ["yes", "no"], "log_probs": [score, 0.5], "scores": {"acc": score},
            }
            for n, score in enumerate(scores)
        ]  # fmt: skip
        with folder.appending("arc_easy") as write:
            for record in records:
                write(record)
        folder.finish("arc_easy", settings, records)
        return folder.path

    return make


def words_of(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page.read_text("utf-8").split("</style>")[1]))


def test_differences_are_paired(results, tmp_path):
    first, second = results("one", [0.0] * 20 + [1.0] * 20), results("two", [0.0] * 10 + [1.0] * 30)
    words = words_of(write_comparison([first, second], tmp_path / "page.html"))
    # 10 of 40 items better, none worse: sd of the differences is 0.4385, over the root of 40.
    assert "0.5000" in words and "0.7500" in words and "+0.2500 &plusmn; 0.0693" in words and "10, 0 of 40" in words
    assert "prompt cut" in words and "Items that two scores otherwise" in words
    assert 'class="better"' in (tmp_path / "page.html").read_text()


def test_what_cannot_be_compared_is_said(results, tmp_path):
    first, second = results("one", [0.0, 1.0]), results("two", [1.0, 1.0, 1.0], shots=5)
    words = words_of(write_comparison([first, second], tmp_path / "page.html"))
    assert "shots differs" in words and "different numbers of items" in words and "of 2" in words


def test_text_is_shown_as_text(results, tmp_path):
    first = results("one", [0.0, 1.0], prompt="<script>alert(1)</script>\x1b")
    second = results("two", [1.0, 1.0])
    page = write_comparison([first, second], tmp_path / "page.html").read_text("utf-8")
    assert "<script>" not in page and "&lt;script&gt;" in page and "\x1b" not in page
    assert "http" not in page


def test_the_command_writes_the_page(make_checkpoint, task_folder, tmp_path, capsys):
    models = [str(make_checkpoint(name, seed=seed)) for seed, name in enumerate(("one", "two"))]
    out = tmp_path / "eval"
    assert main(["eval", *models, "--tasks", "arc_easy", "--data", str(task_folder), "--out", str(out)]) == 0
    assert f"comparison: {out / 'comparison.html'}" in capsys.readouterr().out
    assert "two-step-00000007 less one-step-00000007" in words_of(out / "comparison.html")
    folders = [str(out / "one-step-00000007"), str(out / "two-step-00000007")]
    assert main(["eval", "--compare", *reversed(folders), "--out", str(tmp_path / "again")]) == 0
    assert "one-step-00000007 less two-step-00000007" in words_of(tmp_path / "again" / "comparison.html")
    assert main(["eval", "--compare", str(tmp_path), "--out", str(out)]) == 2
    assert "holds no results.json" in capsys.readouterr().err
