"""The held-out split: decided by the text alone."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from warploom.data import heldout, survey
from warploom.data.heldout import BLOCK_CHARS, HASH_RANGE, blocks, sides
from warploom.data.survey import SAMPLE_BYTES
from warploom.data.survey import survey as make_survey


def long_text(seed, paragraphs):
    rng = random.Random(seed)
    return "\n\n".join(
        " ".join(f"w{rng.randrange(1000)}" for _ in range(rng.randrange(1, 200))) for _ in range(paragraphs)
    )


@given(st.text(st.sampled_from("ab \n"), max_size=400), st.integers(1, 40))
def test_blocks_join_to_the_text_and_keep_to_their_size(text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heldout, "BLOCK_CHARS", size)
        cut = list(blocks(text))
    assert "".join(cut) == text
    assert all(size <= len(block) <= 2 * size + 1 for block in cut[:-1])
    assert len(cut[-1]) <= 2 * size


def test_blocks_end_at_paragraphs_where_they_can():
    text = long_text(0, 200)
    assert all(block.endswith("\n\n") for block in list(blocks(text))[:-1])
    lines = text.replace("\n\n", "\n")
    assert all(block.endswith("\n") for block in list(blocks(lines))[:-1])
    assert [len(block) for block in blocks("x" * 3 * BLOCK_CHARS)] == [2 * BLOCK_CHARS, BLOCK_CHARS]


def test_a_block_falls_on_the_same_side_wherever_its_document_stands():
    text, more = long_text(1, 300), long_text(2, 300)
    threshold = HASH_RANGE // 3
    first = list(sides(text, "block", threshold))
    assert list(sides(text, "block", threshold)) == first
    assert "".join(piece for _, piece in first) == text
    assert {side for side, _ in first} == {False, True}
    assert all(a[0] != b[0] for a, b in zip(first, first[1:], strict=False)), "neighbours of one side are joined"
    # What is appended changes only the last block: the rest of the document is cut and decided as before.
    longer = list(sides(text + more, "block", threshold))
    assert longer[: len(first) - 1] == first[:-1]


@given(st.lists(st.text(max_size=20), min_size=1, max_size=50), st.floats(0.01, 0.9))
def test_whole_documents_are_decided_by_their_text(texts, fraction):
    threshold = int(fraction * HASH_RANGE)
    side = {text: next(sides(text, "document", threshold))[0] for text in texts}
    for text in random.Random(0).sample(texts, len(texts)):
        assert list(sides(text, "document", threshold)) == [(side[text], text)]


def test_the_share_held_out_is_the_one_asked_for():
    texts = [f"document {i}" for i in range(20_000)]
    for fraction in (0.01, 0.05, 0.5):
        held = sum(next(sides(text, "document", int(fraction * HASH_RANGE)))[0] for text in texts)
        assert abs(held / len(texts) - fraction) < 4 * (fraction * (1 - fraction) / len(texts)) ** 0.5


def ignore(num_bytes):
    pass


def test_few_documents_are_split_by_block_and_many_as_a_whole():
    many = [f"document {i}" for i in range(200)]
    assert make_survey(lambda: iter(many), 0.05, "auto", ignore).unit == "document"
    assert make_survey(lambda: iter(many[1:]), 0.05, "auto", ignore).unit == "block"
    assert make_survey(lambda: iter(many[1:]), 0.05, "document", ignore).unit == "document"


def test_a_survey_does_not_depend_on_order(monkeypatch):
    monkeypatch.setattr(survey, "SAMPLE_BYTES", 20_000)
    texts = [long_text(seed, 10) for seed in range(40)]
    first = make_survey(lambda: iter(texts), 0.1, "auto", ignore)
    random.Random(0).shuffle(texts)
    assert make_survey(lambda: iter(texts), 0.1, "auto", ignore) == first
    assert first.num_bytes == sum(map(len, texts))
    assert 10_000 < sum(map(len, first.sample)) <= 20_000


def test_the_tokenizer_sample_holds_nothing_that_is_held_out():
    texts = [long_text(seed, 40) for seed in range(20)]
    plan = make_survey(lambda: iter(texts), 0.3, "auto", ignore)
    held = [piece for text in texts for side, piece in sides(text, plan.unit, plan.threshold) if side]
    trained = [piece for text in texts for side, piece in sides(text, plan.unit, plan.threshold) if not side]
    assert held
    assert sum(map(len, plan.sample)) == sum(map(len, trained)) < SAMPLE_BYTES
    assert not any(block in piece for block in plan.sample for piece in held)


def test_a_tiny_corpus_still_holds_something_out():
    texts = ["one", "two", "three"]
    plan = make_survey(lambda: iter(texts), 0.0001, "auto", ignore)
    held = [text for text in texts if next(sides(text, plan.unit, plan.threshold))[0]]
    assert len(held) == 1
    assert sorted(plan.sample) == sorted(set(texts) - set(held))
