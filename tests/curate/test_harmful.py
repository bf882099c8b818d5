import csv

import pytest

from warploom.curate.classifier import Classifier, accuracy, read_examples
from warploom.curate.document import Document
from warploom.curate.harmful import Bias, Harmful
from warploom.errors import UserError


def test_terms_are_whole_words_in_any_case(tmp_path):
    (tmp_path / "words.txt").write_text("darn\nbad word\n\n!\n", encoding="utf-8")
    step = Harmful(words=str(tmp_path / "words.txt"), max_terms=2)
    document = Document(text="Darn it, this BAD WORD! darning bad words d\u00e4rn", id="1")
    step.apply(document)
    assert document.scores["harmful.terms"] == 2
    assert step.first_failure(document.scores) is None
    document.text += " darn"
    step.apply(document)
    assert step.first_failure(document.scores) == "harmful.max_terms"
    with pytest.raises(UserError, match="cannot read the word list"):
        Harmful(words=str(tmp_path / "none.txt"))


def test_bias_is_counted_before_and_after_a_cut(curate, write_documents, tmp_path):
    (tmp_path / "words.txt").write_text("darn\n", encoding="utf-8")
    texts = ["She is a woman.", "The gay man said darn.", "Gay people met.", "The weather, darn it.", "The weather."]
    run = curate(f"""
[[source]]
name = "a"
paths = ["{write_documents("a.jsonl", texts)}"]
[[step]]
use = "harmful"
words = "{tmp_path}/words.txt"
max_terms = 0
[[step]]
use = "bias"
""")
    table = run.manifest()["bias"]["a"]
    assert table["gay"] == {"before": 2, "after": 1, "harmful_before": 1, "harmful_after": 0}
    assert table["women"] == {"before": 1, "after": 1, "harmful_before": 0, "harmful_after": 0}
    assert table["all documents"] == {"before": 5, "after": 3, "harmful_before": 2, "harmful_after": 0}
    assert "Mentions of groups" in (run.folder / "report.html").read_text(encoding="utf-8")


def test_groups_are_whole_words():
    document = Document(text="Germany shears mankind; the Jewish woman", id="1")
    Bias().apply(document)
    assert document.scores == {"bias.jewish": 1, "bias.women": 1}


def test_a_classifier_learns_labels_and_is_the_same_again(shared_data, tmp_path):
    """Surge's 1,000 labelled comments; half teach, half test. Always guessing would give 0.5."""
    with open(shared_data / "web" / "surge_toxicity_en.csv", newline="", encoding="utf-8") as file:
        rows = [(row["text"], row["is_toxic"] == "Toxic") for row in csv.DictReader(file)]
    toxic, fine = ([text for text, label in rows if label is wanted] for wanted in (True, False))
    assert len(toxic) + len(fine) == len(rows) == 1000
    model = Classifier.train(toxic[::2], fine[::2])
    figures = accuracy(model, toxic[1::2], fine[1::2])
    assert figures["auc"] > 0.8 and figures["accuracy"] > 0.7
    model.save(tmp_path / "a.safetensors")
    Classifier.train(toxic[::2], fine[::2]).save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    loaded = Classifier.load(tmp_path / "a.safetensors")
    assert loaded.probability(toxic[1]) == pytest.approx(model.probability(toxic[1]))


def test_quality_from_two_folders(curate, write_documents, tmp_path, rows_of):
    good = ["the farmer wrote a careful letter about the harvest"] * 5
    bad = ["buy cheap pills now click here win free prize"] * 5
    for name, texts in (("good", good), ("bad", bad)):
        (tmp_path / name).mkdir()
        for i, text in enumerate(texts):
            (tmp_path / name / f"{i}.txt").write_text(f"{text} {i}", encoding="utf-8")
    examples = [read_examples(tmp_path / name)[""] for name in ("good", "bad")]
    Classifier.train(*examples).save(tmp_path / "quality.safetensors")
    run = curate(f"""
keep_dropped = true
[[source]]
name = "a"
paths = ["{write_documents("a.jsonl", ["a careful letter of the farmer", "free pills, click now", "the harvest"])}"]
[[step]]
use = "classifier"
name = "quality"
model = "{tmp_path}/quality.safetensors"
min_score = 0.5
""")
    assert [(row["text"], row["reason"]) for row in rows_of(run, "dropped")] == [
        ("free pills, click now", "quality.min_score")
    ]


def test_a_classifier_needs_both_classes_and_a_file_of_its_own(tmp_path):
    with pytest.raises(UserError, match="got 1 positive and 0 negative"):
        Classifier.train(["a"], [])
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot read the classifier"):
        Classifier.load(tmp_path / "x.safetensors")
