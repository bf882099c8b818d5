import json
import random

import pytest

from warploom.cli.main import main
from warploom.curate.pipeline import load_pipeline
from warploom.curate.workers import run_pipeline
from warploom.data.dataset import TokenDataset
from warploom.errors import UserError

WORDS = [f"word{i}" for i in range(300)] + ["the", "and", "of", "with"] * 20


@pytest.fixture
def pipeline_file(tmp_path):
    rng = random.Random(0)
    for name in ("a", "b"):
        rows = [{"text": " ".join(rng.choices(WORDS, k=rng.randrange(40, 120))) + " <b>&"} for _ in range(40)]
        rows.append({"text": "too short"})
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    file = tmp_path / "pipeline.toml"
    file.write_text(
        f"""
[[source]]
name = "a"
paths = ["{tmp_path}/a.jsonl"]
[[source]]
name = "b"
paths = ["{tmp_path}/b.jsonl"]
[[step]]
use = "gopher_quality"
min_words = 30
[tokens]
vocab_size = 280
""",
        encoding="utf-8",
    )
    return file


def test_run_trace_seen_and_audit(pipeline_file, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["data", "run", str(pipeline_file), "--out", str(out), "--workers", "inline"]) == 0
    printed = capsys.readouterr().out
    assert "gopher_quality" in printed and "report.html" in printed
    assert "WARNING: rules that keep every document" in printed
    assert TokenDataset(out / "tokens").train.num_documents > 60
    assert main(["data", "trace", str(out), "100"]) == 0
    assert ".jsonl\nrecord " in capsys.readouterr().out
    assert main(["data", "seen", str(out), "20", "--seq-len", "32"]) == 0
    assert capsys.readouterr().out.count("%") == 2
    assert main(["data", "audit", str(out), "--min-count", "5"]) == 0
    assert "occurrences" in capsys.readouterr().out
    assert main(["data", "trace", str(out), "100000000"]) == 2


def test_slurm_and_task(pipeline_file, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["data", "slurm", str(pipeline_file), "--out", str(out), "--options=--partition=cpu"]) == 0
    assert capsys.readouterr().out.count("sbatch --parsable --partition=cpu") == 7
    assert main(["data", "task", str(out), "tag", "0"]) == 0
    assert (out / "work").is_dir()


@pytest.mark.parametrize(("phase", "index"), [("tagg", "0"), ("tag", "5"), ("tag", "-1")])
def test_a_task_that_is_none_is_refused(pipeline_file, tmp_path, capsys, phase, index):
    out = tmp_path / "out"
    assert main(["data", "slurm", str(pipeline_file), "--out", str(out)]) == 0
    assert main(["data", "task", str(out), phase, f"{index}"]) == 2
    assert "has no" in capsys.readouterr().err


def test_classifier(tmp_path, capsys):
    rows = [{"text": f"good harvest letter {i}", "label": "fine"} for i in range(20)]
    rows += [{"text": f"win free prize {i}", "label": "spam"} for i in range(20)]
    file = tmp_path / "labels.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    out = tmp_path / "spam.safetensors"
    command = ["data", "classifier", "--positive", str(file), "--out", str(out)]
    assert main([*command, "--label", "spam"]) == 0
    assert "accuracy 1.000" in capsys.readouterr().out and out.exists()
    assert main([*command, "--label", "spamm"]) == 2
    assert "did you mean 'spam'" in capsys.readouterr().err


def test_the_report_is_one_page_that_shows_what_was_done(pipeline_file, tmp_path):
    run = run_pipeline(pipeline_file, tmp_path / "out", "inline")
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<details") == len(run.manifest()["rules"]) and "too short" in page
    assert "&lt;b&gt;&amp;" in page and "<b>&" not in page  # samples are text, never markup
    assert "http://" not in page and "https://" not in page and "<script" not in page
    rules = run.manifest()["rules"]
    assert rules["gopher_quality.min_words"]["dropped"] == 2
    assert len(rules["gopher_quality.max_words"]["kept_samples"]) == 20
    (entry,) = run.manifest()["funnel"]
    assert entry["documents_in"] == 82 and entry["tokens_in"] > entry["tokens_dropped"] > 0


PYTHON = """
from warploom.curate.pipeline import Pipeline, Source
from warploom.curate.steps import Function, build_steps

def shout(documents):
    for document in documents:
        document.text = document.text.upper()
        yield document

def pipeline():
    return Pipeline(
        sources=(Source(name="a", paths=("{folder}/a.jsonl",)),),
        steps=[*build_steps([{{"use": "gopher_quality", "min_words": 30, "min_stop_words": 0}}]),
               Function(name="shout", function=shout)],
    )
"""


def test_a_pipeline_in_python_with_a_step_of_its_own(pipeline_file, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(PYTHON.format(folder=tmp_path), encoding="utf-8")
    run = run_pipeline(file, tmp_path / "out", "pool", num_workers=2)
    from warploom.curate.segments import read_jsonl

    texts = [row["text"] for part in sorted((run.folder / "train").iterdir()) for row in read_jsonl(part)]
    assert texts and all(text == text.upper() for text in texts)
    assert run.manifest()["funnel"][1]["step"] == "shout"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has no \[\[source\]\]"),
        ("[source]\nname=1", "must be a list of tables"),
        ("x = 1", "unknown entry 'x'"),
        ('[[source]]\nname = "a"', "is not complete"),
        ('[[source]]\nname = "a"\npath = "x"', "did you mean 'paths'"),
        ('[[source]]\nname = "a"\npaths = "x"\n[heldout]\nfraction = 2', "must be between 0 and 1"),
        ('[[source]]\nname = "a"\npaths = "x"\n[mix]\ntemperature = 0', "must be above 0"),
        ('[[source]]\nname = "a"\npaths = "x"\n[[step]]\nuse = "redact"\n[[step]]\nuse = "c4"', "put it before"),
        ('[[source]]\nname = "a"\npaths = "x"\n[[step]]\nuse = "c4"\n[[step]]\nuse = "c4"', "two steps have the name"),
        ('[[source]]\nname = "a"\npaths = "x"\n[[step]]\nuse = "c4"\nname = "c.4"', "must have no dot"),
        ("not toml", "not valid TOML"),
    ],
)
def test_a_wrong_pipeline_is_refused_with_the_way_out(tmp_path, text, message):
    file = tmp_path / "pipeline.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_pipeline(file)


def test_a_file_shared_by_tasks_gives_each_record_once(pipeline_file, tmp_path, monkeypatch):
    monkeypatch.setattr("warploom.curate.run.STRIPE_BYTES", 4000)
    monkeypatch.setattr("warploom.curate.tag.STRIPE_RECORDS", 5)
    run = run_pipeline(pipeline_file, tmp_path / "out", "inline")
    assert len(run.plan["tasks"]) > 4
    assert run.manifest()["funnel"][0]["documents_in"] == 82


@pytest.mark.slow  # a training run of twenty seconds
def test_a_time_budget_trains_on_what_was_curated(pipeline_file, tmp_path, capsys):
    out = tmp_path / "out"
    run_pipeline(pipeline_file, out, "inline")
    command = ["train", "--data", str(out / "tokens"), "--budget", "20s", "--train.out-dir", str(tmp_path / "run")]
    assert main(command) == 0
    assert "Held-out loss" in capsys.readouterr().out
