import csv
import io
import json
import lzma
import tarfile

import pytest

from warploom.curate.decontaminate import Decontaminate, strings
from warploom.curate.document import Document
from warploom.errors import UserError

QUESTION = "Which of the two trains will reach the station first if both leave the depot at noon on Monday"
ANSWER = "the train that carries no coal at all reaches it first"
FILLER = " In the spring the farmers of the valley bring their sheep to the high pastures. "


@pytest.fixture
def tasks(tmp_path):
    folder = tmp_path / "tasks"
    (folder / "trains").mkdir(parents=True)
    row = {"question": QUESTION, "choices": {"text": [ANSWER, "the other one"]}, "id": 3}
    (folder / "trains" / "test.jsonl.xz").write_bytes(lzma.compress(json.dumps(row).encode()))
    with open(folder / "truth.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(["what a parrot says when nobody listens to it in the dark cage", "yes"])
    data = b'"a question of the archive that is long enough to be indexed here",A\n'
    with tarfile.open(folder / "subjects.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("data/test/law_test.csv")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return folder


def hits(step, text):
    document = Document(text=text, id="1")
    step.apply(document)
    return document.scores


def test_strings_come_from_any_depth_and_format(tasks):
    assert list(strings(tasks / "trains" / "test.jsonl.xz")) == [QUESTION, ANSWER, "the other one"]
    assert list(strings(tasks / "truth.csv"))[0].startswith("what a parrot")
    assert list(strings(tasks / "subjects.tar.gz"))[1] == "A"


@pytest.mark.parametrize(
    ("text", "task"),
    [
        (QUESTION.upper().replace(" ", ",  "), "trains"),
        (FILLER + QUESTION + FILLER, "trains"),
        (FILLER + " ".join(QUESTION.split()[:13]) + FILLER, "trains"),
        (FILLER + ANSWER + FILLER, "trains"),  # shorter than an n-gram: found as a whole
        (FILLER + "What a parrot says when nobody listens to it in the dark cage", "truth"),
        ("A question of the archive that is long enough to be indexed here", "subjects"),
        (FILLER + " ".join(QUESTION.split()[:12]) + FILLER, None),
        (" ".join(ANSWER.split()[:-1]), None),
        ("the other one", None),
        # Words in a row of the index, but of two strings of it.
        (" ".join(QUESTION.split()[-7:] + ANSWER.split()[:6]), None),
        (FILLER * 20, None),
    ],
)
def test_what_counts_as_contamination(tasks, text, task):
    step = Decontaminate(tasks=str(tasks))
    found = hits(step, text)
    assert (found["decontaminate.hits"] > 0) == (task is not None)
    assert step.first_failure(found) == (task and "decontaminate.max_hits")
    assert [name.rpartition(".")[2] for name in found if name.count(".") == 2] == ([task] if task else [])


def test_every_item_of_the_real_task_files_is_found(shared_data):
    """Each official question of enough words, hidden in other text, is a hit; prose is none."""
    step = Decontaminate(tasks=str(shared_data / "eval"))
    counts = step.benchmarks()
    assert set(counts) >= {"arc", "gsm8k", "hellaswag", "humaneval", "mmlu", "mt_bench", "truthfulqa"}
    assert all(count > 50 for name, count in counts.items() if name != "mt_bench")
    with open(shared_data / "eval" / "gsm8k" / "test.jsonl", encoding="utf-8") as file:
        questions = [json.loads(line)["question"] for line in file][::40]
    for question in questions:
        assert hits(step, FILLER + question + FILLER)["decontaminate.hits.gsm8k"] > 0
    assert hits(step, FILLER * 10)["decontaminate.hits"] == 0


def test_the_report_names_each_benchmark(curate, write_documents, tasks, rows_of):
    run = curate(f"""
keep_dropped = true
[[source]]
name = "a"
paths = ["{write_documents("a.jsonl", [FILLER, FILLER + QUESTION, ANSWER, "clean text"])}"]
[[step]]
use = "decontaminate"
tasks = "{tasks}"
""")
    assert run.manifest()["contamination"] == {
        "subjects": {"strings": 1, "documents": 0},
        "trains": {"strings": 2, "documents": 2},
        "truth": {"strings": 1, "documents": 0},
    }
    assert len(rows_of(run, "dropped")) == 2


def test_a_folder_without_tasks_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "too short"}', encoding="utf-8")
    with pytest.raises(UserError, match="no string of 8 words"):
        Decontaminate(tasks=str(tmp_path))
