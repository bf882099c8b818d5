import shutil

import pytest

from warploom.curate.run import Run
from warploom.data.dataset import TokenDataset
from warploom.errors import UserError

SENTENCES = [
    f"The {noun} of number {i} went to the {place} and that was the end of what they have to say about it.\n"
    f"It came back with {i * 7} {noun}s, counted by the {place} keeper, who wrote a long letter on day {i * 13}.\n"
    f"Nobody in the {place} read letter {i * 31} but the {noun} of the {i % 5} winds, and so the matter {i * 3} rested."
    + i
    % 3
    * f"\nThat is all, and the {i * 17} days that followed were quiet ones in the {place}."
    for i, (noun, place) in enumerate(
        (noun, place)
        for noun in ("farmer", "sailor", "baker", "miller", "tailor", "weaver")
        for place in ("market", "harbour", "tower", "forest", "village", "bridge")
    )
]


def pipeline(path, steps="", rest=""):
    return f"""
keep_dropped = true
{rest}
[[source]]
name = "a"
paths = ["{path}"]
{steps}
"""


def test_from_web_archive_to_tokens_that_training_reads(curate, shared_data, rows_of):
    steps = """
[[step]]
use = "extract"
[[step]]
use = "language"
[[step]]
use = "gopher_quality"
[[step]]
use = "near_dedup"
[[step]]
use = "redact"
[heldout]
fraction = 0.2
by = "cluster"
[tokens]
vocab_size = 300
"""
    run = curate(pipeline(shared_data / "web" / "dolma-sample-0001.warc.gz", steps))
    manifest = run.manifest()
    dataset = TokenDataset(run.folder / "tokens")
    dataset.verify()
    kept = rows_of(run, "train") + rows_of(run, "heldout")
    dropped = rows_of(run, "dropped")
    assert len(kept) + len(dropped) == manifest["funnel"][0]["documents_in"] == 15
    assert {row["url"] for row in kept} <= {row["url"] for row in kept + dropped}
    # Three copies of allenai.org's front page: one is kept.
    assert sum(row["reason"] == "near_dedup.copy" for row in dropped) >= 2
    assert dataset.train.num_documents == len(rows_of(run, "train"))
    first = dataset.tokenizer.decode(dataset.heldout.read(dataset.heldout.document_starts[:1] + 1, 40)[0])
    assert rows_of(run, "heldout")[0]["text"].startswith(first.split("<|endoftext|>")[0])
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "near_dedup.copy" in page and "gopher_quality.min_words" in page
    assert all(entry["seconds"] > 0 for entry in manifest["funnel"]) and manifest["phases"]["tag"] > 0
    assert manifest["rules"]["language.min_score"]["step_seconds"] == manifest["funnel"][1]["seconds"]
    assert f"its step took {manifest['funnel'][1]['seconds']:.2f} CPU s" in page and "encode" in page


def test_thresholds_change_without_another_pass_over_the_text(curate, write_documents, rows_of, monkeypatch):
    path = write_documents("a.jsonl", SENTENCES)
    step = '[[step]]\nuse = "gopher_quality"\nmin_words = {}\n'
    first = curate(pipeline(path, step.format(1)))
    assert not rows_of(first, "dropped")
    monkeypatch.setattr("warploom.curate.run.tag", None)  # a second pass would fail
    second = curate(pipeline(path, step.format(70)))
    dropped = rows_of(second, "dropped")
    assert dropped and {row["reason"] for row in dropped} == {"gopher_quality.min_words"}
    assert len(dropped) + len(rows_of(second, "train")) + len(rows_of(second, "heldout")) == len(SENTENCES)


def test_a_changed_word_list_or_source_is_noticed(curate, write_documents, rows_of, tmp_path):
    path = write_documents("a.jsonl", ["a plain text", "another darn text"])
    steps = f'[[step]]\nuse = "harmful"\nwords = "{tmp_path}/words.txt"\nmax_terms = 0\n'
    (tmp_path / "words.txt").write_text("darn", encoding="utf-8")
    assert len(rows_of(curate(pipeline(path, steps)), "dropped")) == 1
    (tmp_path / "words.txt").write_text("unheard", encoding="utf-8")
    assert not rows_of(curate(pipeline(path, steps)), "dropped")
    write_documents("a.jsonl", ["a plain text", "another darn text", "unheard of"])
    assert len(rows_of(curate(pipeline(path, steps)), "dropped")) == 1


def test_going_back_to_older_thresholds_gives_their_result_again(curate, write_documents, rows_of):
    path = write_documents("a.jsonl", SENTENCES)
    step = '[[step]]\nuse = "gopher_quality"\nmin_words = {}\n'
    for words in (1, 70, 1):
        run = curate(pipeline(path, step.format(words)))
        assert bool(rows_of(run, "dropped")) == (words == 70)


def test_an_early_step_spares_the_steps_after_it(curate, write_documents):
    path = write_documents("a.jsonl", SENTENCES)
    steps = '[[step]]\nuse = "gopher_quality"\nmin_words = 70\nearly = {}\n[[step]]\nuse = "near_dedup"\n'
    late = curate(pipeline(path, steps.format("false")), out="late").manifest()
    early = curate(pipeline(path, steps.format("true")), out="early").manifest()
    assert late["sources"] == early["sources"]
    counts = [run["funnel"][1]["mb_per_core_second"] is not None for run in (late, early)]
    assert counts == [True, True]


def test_a_folder_with_other_files_is_left_alone(curate, write_documents, tmp_path):
    path = write_documents("a.jsonl", SENTENCES)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="holds other files"):
        curate(pipeline(path))
    assert (tmp_path / "out" / "thesis.txt").read_text(encoding="utf-8") == "mine"


def test_a_run_without_a_document_left_says_which_rule(curate, write_documents):
    path = write_documents("a.jsonl", SENTENCES)
    with pytest.raises(UserError, match=r"no document is left of 36: gopher_quality.min_words"):
        curate(pipeline(path, '[[step]]\nuse = "gopher_quality"\nmin_words = 5000\n'))


def test_a_run_is_opened_only_where_one_is(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        Run(tmp_path)
    shutil.rmtree(tmp_path)
