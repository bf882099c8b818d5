"""Items and prompts of the benchmarks, from files in the official forms and in others."""

import pytest

from warploom.data.task_files import read_rows
from warploom.errors import UserError
from warploom.evaluation.multiple_choice import chosen
from warploom.evaluation.task import TaskFiles
from warploom.evaluation.tasks import TASKS

MMLU_PROMPT = """\
The following are multiple choice questions (with answers) about plant science.

Is 0, a leaf dev?
A. yes
B. no
C. a, b
D. both
Answer: A

Is 1, a leaf dev?
A. yes
B. no
C. a, b
D. both
Answer: B

Is 2, a leaf test?
A. yes
B. no
C. a, b
D. both
Answer:"""


def items(name, places, num_shots=None):
    task = TASKS[name]
    return task.items(TaskFiles(places), task.num_shots if num_shots is None else num_shots)


def test_arc(task_folder):
    found = items("arc_easy", [task_folder])
    assert [item.id for item in found] == [f"q{n}" for n in range(8)]
    assert found[1].prompt == "Question: what is plant 1?\nAnswer:"
    assert found[1].values == {"choices": ["one", "the other one", "café"], "gold": 1}
    shown = items("arc_easy", [task_folder], 2)[1].prompt
    assert shown == (
        "Question: what is plant 0?\nAnswer: the sun\n\nQuestion: what is plant 1?\nAnswer: the other one\n\n"
        "Question: what is plant 1?\nAnswer:"
    )
    with pytest.raises(UserError, match="arc_easy has 3 examples to show, and shots is 4"):
        items("arc_easy", [task_folder], 4)


def test_hellaswag(task_folder):
    found = items("hellaswag", [task_folder])
    assert found[0].prompt == "Plants: The sun is out. A leaf"
    assert found[0].values == {"choices": ["grows fast.", "is green.", "sings.", "is a 你好."], "gold": 1}
    assert found[1].values["gold"] == 3


def test_mmlu(task_folder):
    found = items("mmlu", [task_folder], 2)
    assert len(found) == 8 and {item.group for item in found} == {"plant_science", "logic"}
    item = next(item for item in found if item.id == "plant_science/2")
    assert item.prompt == MMLU_PROMPT
    assert item.values == {"choices": "ABCD", "gold": 2} or item.values == {"choices": list("ABCD"), "gold": 2}


def test_truthfulqa(task_folder):
    (item, *_) = items("truthfulqa", [task_folder])
    assert item.prompt.startswith("Q: What is human life expectancy") and item.prompt.endswith(
        "Spain.\n\nQ: Is leaf 0 green?\nA:"
    )
    choices = item.values["choices"]
    assert sorted(choices) == ["It is green.", "It is the sun.", "No.", "Yes."]
    assert {choices[place]: label for place, label in item.values["mc2"]} == {
        "Yes.": 1, "It is green.": 1, "No.": 0, "It is the sun.": 0,
    }  # fmt: skip
    with pytest.raises(UserError, match="takes no shots"):
        items("truthfulqa", [task_folder], 5)


def test_the_rules_of_choice_differ():
    choices = ["a", "four", "日本"]  # 1, 4, 2 characters; 1, 4, 6 bytes
    assert chosen(choices, [-2.0, -3.0, -2.5]) == {"acc": 0, "acc_norm": 1, "acc_bytes": 2}
    assert chosen(choices, [-1.0, -1.0, -1.0])["acc"] == 0


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_hugging_face_data_sets_are_read_as_they_were_saved(tmp_path, kind, task_folder):
    """The columns of the hub's data sets, in Parquet files and as save_to_disk writes them."""
    datasets = pytest.importorskip("datasets")
    saved = {
        "arc_easy": {
            "id": ["q1"], "question": ["what is plant 1?"], "answerKey": ["B"],
            "choices": [{"text": ["one", "the other one", "café"], "label": ["A", "B", "C"]}],
        },
        "mmlu": {
            "question": ["Is 0?"], "subject": ["logic"], "choices": [["yes", "no", "a", "b"]], "answer": [2],
        },
        "truthful_qa_multiple_choice": {
            "question": ["Is leaf 0 green?"],
            "mc1_targets": [{"choices": ["Yes.", "No.", "It is the sun."], "labels": [1, 0, 0]}],
            "mc2_targets": [{"choices": ["Yes.", "It is green.", "No.", "It is the sun."], "labels": [1, 1, 0, 0]}],
        },
    }  # fmt: skip
    for name, columns in saved.items():
        split = datasets.Dataset.from_dict(columns)
        if kind == "arrow":
            datasets.DatasetDict({"test": split}).save_to_disk(str(tmp_path / name))
        else:
            (tmp_path / name).mkdir()
            split.to_parquet(str(tmp_path / name / "test-00000-of-00001.parquet"))
    (arc,) = items("arc_easy", [tmp_path])
    assert arc == items("arc_easy", [task_folder])[1]
    (mmlu,) = items("mmlu", [tmp_path], 0)
    assert (mmlu.id, mmlu.values["gold"]) == ("logic/0", 2) and "C. a\n" in mmlu.prompt
    assert items("truthfulqa", [tmp_path])[0] == items("truthfulqa", [task_folder])[0]


def test_files_are_found_by_name_or_given(task_folder, tmp_path):
    alone = tmp_path / "questions.jsonl"
    alone.write_bytes((task_folder / "arc" / "ARC-Easy-Test.jsonl").read_bytes())
    assert items("arc_challenge", [f"arc_challenge={alone}"]) == items("arc_easy", [task_folder])
    with pytest.raises(UserError, match="no test file of arc_challenge.*--data arc_challenge=PATH"):
        items("arc_challenge", [task_folder])
    alone.write_text('{"id": "1", "question": "?"}\n')
    with pytest.raises(UserError, match="a row of arc_challenge lacks answerKey; it has id, question"):
        items("arc_challenge", [f"arc_challenge={alone}"])
    alone.write_text("no JSON\n")
    with pytest.raises(UserError, match="questions.jsonl is damaged or no task file"):
        list(read_rows(alone))


def test_the_official_files_are_read_whole(shared_data):
    """Counts as published: MMLU 14,042 questions of 57 subjects, and so on."""
    files = TaskFiles([shared_data / "eval"])
    counts = {"arc_easy": 2376, "arc_challenge": 1172, "hellaswag": 10042, "mmlu": 14042, "truthfulqa": 817}
    for name, count in counts.items():
        found = TASKS[name].items(files, TASKS[name].num_shots)
        assert len({item.id for item in found}) == count
        if name == "mmlu":
            assert len({item.group for item in found}) == 57
            assert found[0].prompt.count("Answer:") == 6


def test_contexts_in_one_piece_are_parted_as_the_authors_did(shared_data):
    """1,000 validation rows have ctx_a and ctx_b; the whole split here has the context in one piece. Where rows agree,
    prompts do too."""
    folder = shared_data / "eval" / "hellaswag"
    official = items("hellaswag", [f"hellaswag={folder / 'hellaswag_val_1000_official_fields.jsonl'}"])
    whole = {
        tuple(item.values["choices"]): item
        for item in items("hellaswag", [f"hellaswag={folder / 'hellaswag_val_full_preprocessed.jsonl.xz'}"])
    }
    pairs = [
        (item, whole[tuple(item.values["choices"])]) for item in official if tuple(item.values["choices"]) in whole
    ]
    assert len(pairs) > 900
    assert [pair for pair in pairs if pair[0].prompt != pair[1].prompt or pair[0].values != pair[1].values] == []


def test_arc_of_two_sources_is_the_same_but_for_numbered_choices(shared_data):
    """The other source misreads questions whose choices are numbered from one: 23 of its answers are one late."""
    folder = shared_data / "eval"
    official = items("arc_challenge", [folder / "arc"])
    other = items("arc_challenge", [folder / "mosaic-icl"])
    pairs = list(zip(official, other, strict=True))
    assert [a.prompt for a in official] == [b.prompt for b in other]
    late = [(a, b) for a, b in pairs if b.values["gold"] != a.values["gold"]]
    assert {b.values["gold"] - a.values["gold"] for a, b in late} <= {1, 2}
    assert (len(pairs), len(late), sum(a.values == b.values for a, b in pairs)) == (1172, 23, 1146)
