"""The rules against their definitions, written out word by word."""

import math
import random
import re
from collections import Counter

import pytest

from warploom.curate.document import Document
from warploom.curate.quality import C4Lines, FineWeb, GopherQuality, RefinedWebLines
from warploom.curate.repetition import GopherRepetition
from warploom.curate.steps import PRESETS, STEPS, build_steps
from warploom.curate.words import count_words, split_words
from warploom.errors import UserError


def scores(step, text):
    document = Document(text=text, id="1")
    step.apply(document)
    return {name.partition(".")[2]: value for name, value in document.scores.items()}, document


def repetition(text):
    """Gopher's table A1, with no regard to time."""
    words = text.split()
    found = {}
    for n in range(2, 5):
        grams = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
        counts = Counter(grams)
        top = max(counts.values(), default=0)
        gram = next((gram for gram in grams if counts[gram] == top), "")
        found[f"top_{n}gram"] = len(gram) * top / len(text) if top > 1 else 0
    for n in range(5, 11):
        seen, chars, i = set(), 0, 0
        while i < len(words) - n + 1:
            gram = tuple(words[i : i + n])
            if gram in seen:
                chars += sum(map(len, gram))
                i += n
            else:
                seen.add(gram)
                i += 1
        found[f"duplicate_{n}gram"] = chars / len(text)
    return found


@pytest.mark.parametrize("seed", range(25))
def test_repetition_is_that_of_the_definition(seed):
    rng = random.Random(seed)
    vocabulary = [rng.choice("ab\u00e9\u4e2d") * rng.randrange(1, 4) for _ in range(rng.choice([2, 5, 30, 300]))]
    words = rng.choices(vocabulary, k=rng.randrange(1, 200))
    if seed % 2:  # a passage said again
        words += words[: len(words) // 2]
    text = " ".join(words)
    found, _ = scores(GopherRepetition(), text)
    for name, value in repetition(text).items():
        assert math.isclose(found[name], value, abs_tol=1e-5), name


def test_duplicate_lines_and_paragraphs():
    found, _ = scores(GopherRepetition(), "one\ntwo\none\n\nlast words\n\nlast words")
    assert found["duplicate_lines"] == pytest.approx(2 / 5)
    assert found["duplicate_line_chars"] == pytest.approx((3 + 10) / 35, abs=1e-5)
    assert found["duplicate_paragraphs"] == pytest.approx(1 / 3, abs=1e-5)
    assert found["duplicate_paragraph_chars"] == pytest.approx(10 / 35, abs=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_paragraphs_are_what_stands_between_empty_lines(seed):
    rng = random.Random(seed)
    text = "".join(rng.choices(["a", "b", "\n", "\n\n", " "], k=rng.randrange(40)))
    parts = [part for part in re.split(r"\n{2,}", text.strip()) if part]
    found, _ = scores(GopherRepetition(), text)
    again = len(parts) - len(set(parts))
    assert found["duplicate_paragraphs"] == pytest.approx(again / max(len(parts), 1), abs=1e-5)


@pytest.mark.parametrize(
    "text", ["", " ", "a", " a", "a ", "a b", "\u2003caf\u00e9\x1f\u4e2d \U00020001\n", "a\x85b\u200bc"]
)
def test_counted_words_are_those_of_split(text):
    assert count_words(text) == len(text.split())


def test_words_longer_than_the_hashing_block(monkeypatch):
    import warploom.curate.words as words

    text = "alpha beta " * 400 + "x" * 3000 + " alpha beta"
    expected = split_words(text, "space")
    monkeypatch.setattr(words, "_BLOCK", 1000)
    words._powers.cache_clear()
    found = split_words(text, "space")
    words._powers.cache_clear()
    same = expected.lengths <= 1000
    assert (found.hashes[same] == expected.hashes[same]).all() and same.sum() == 802
    assert len(set(found.hashes.tolist())) == 3


GOOD = "The cat and the dog have to be with friends, that is what all of them said to me. " * 8


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (GOOD, None),
        ("The cat and the dog.", "min_words"),
        ("the and " * 50_001, "max_words"),
        ("a b c the and d e f g h " * 10, "min_word_length"),
        ("extraordinarily the and incomprehensibilities unconstitutionally " * 20, "max_word_length"),
        (GOOD + "#hashtag " * 25, "max_hashes"),
        (GOOD + "... " * 25, "max_ellipses"),
        ("\n".join(f"-- the farmer and the miller {i} times" for i in range(20)), "max_bullet_lines"),
        (
            "\n".join(f"the cat and all the dog {i} times ..." if i % 2 else GOOD for i in range(20)),
            "max_ellipsis_lines",
        ),
        (GOOD + "1234 " * 60, "min_alphabetic"),
        ("Lorem ipsum dolor sit amet consetetur sadipscing elitr " * 10, "min_stop_words"),
    ],
)
def test_gopher_quality(text, rule):
    step = GopherQuality()
    _, document = scores(step, text)
    assert step.first_failure(document.scores) == (rule and f"gopher_quality.{rule}")


def test_gopher_stop_words_count_once_in_any_case():
    assert scores(GopherQuality(), "The the THE To")[0]["stop_words"] == 2
    assert scores(GopherQuality(), "thee other tobe")[0]["stop_words"] == 0


def test_c4_lines():
    lines = [
        "This line is a proper sentence of words.",
        "no end mark here at all",
        "Too short.",
        "This one asks you to enable javascript first.",
        'He said that this is "a quotation mark."',
        "This line trails off into nothing at all...",
        "y" * 1001 + " is an endless word indeed, sir.",
        "",
        "Is this a question that one may ask?",
    ]
    found, document = scores(C4Lines(), "\n".join(lines))
    assert document.text.split("\n") == [lines[0], lines[4], "", lines[8]]
    assert found == {"sentences": 3, "page_phrases": 0, "lines_removed": 5}
    step = C4Lines(terminal_punctuation=False)
    assert lines[1] in scores(step, "\n".join(lines))[1].text
    assert step.first_failure(scores(C4Lines(), "a { b } c.")[1].scores) is not None
    assert scores(C4Lines(), "Lorem ipsum.")[0]["page_phrases"] == 1


def test_c4_constants_are_visible_and_can_be_swapped():
    (step,) = build_steps([{"use": "c4", "min_line_words": 3, "min_sentences": 5}])
    assert step.settings()["min_line_words"] == 3 and step.settings()["min_sentences"] == 5


def test_fineweb():
    found, _ = scores(FineWeb(), "A line with an end.\nshort one\nshort one\n" + "x" * 40)
    assert found["punctuated_lines"] == 0.25
    assert found["short_lines"] == 0.75
    assert found["duplicate_line_chars"] == pytest.approx(9 / 77, abs=1e-5)
    assert found["newlines_per_word"] == pytest.approx(3 / 10)


def test_refinedweb_lines():
    text = "\n".join(
        [
            "A sentence that is to stay here.",
            "CLICK HERE TO SUBSCRIBE NOW",
            "1234 5678 90",
            "3 likes",
            "sign in",
            "I",
            "",
        ]
    )
    found, document = scores(RefinedWebLines(), text)
    assert document.text.split("\n") == ["A sentence that is to stay here.", "I", ""]
    assert found["removed_words"] == pytest.approx(12 / 20)


def test_every_preset_can_be_built_and_shows_its_constants():
    for name in PRESETS:
        for step in build_steps([{"preset": name}]):
            assert step.rules or step.kind in ("dedup", "span")
            assert all(rule.name in step.settings() for rule in step.rules)
    fineweb = {step.name: step for step in build_steps([{"preset": "fineweb"}])}
    assert list(fineweb) == [
        "extract", "language", "gopher_repetition", "gopher_quality", "c4", "fineweb", "near_dedup", "redact",
    ]  # fmt: skip
    assert fineweb["c4"].terminal_punctuation is False and fineweb["language"].min_score == 0.65


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"use": "gopher_qualty"}, "did you mean 'gopher_quality'"),
        ({}, "a step needs use"),
        ({"preset": "fine"}, "there is no preset 'fine'"),
        ({"preset": "c4", "min_sentences": 2}, "takes no other setting"),
        ({"use": "c4", "min_sentence": 2}, "did you mean 'min_sentences'"),
        ({"use": "c4", "min_sentences": "two"}, "takes min_sentences as a number, got 'two'"),
        ({"use": "c4", "terminal_punctuation": 1}, "takes terminal_punctuation as true or false"),
        ({"use": "redact", "kinds": ["mail"]}, "redact.kinds has 'mail'"),
        ({"use": "unicode", "form": "NFX"}, "unicode.form must be"),
        ({"use": "harmful"}, "needs words"),
        ({"use": "classifier"}, "needs model"),
        ({"use": "url_filter"}, "needs hosts"),
        ({"use": "url_filter", "hosts": "/none"}, "cannot read the list of hosts"),
        ({"use": "decontaminate"}, "needs tasks"),
    ],
)
def test_a_wrong_step_is_refused_with_the_way_out(entry, message):
    with pytest.raises(UserError, match=message):
        build_steps([entry])


def test_every_step_has_its_name_and_says_what_it_does():
    for name, step in STEPS.items():
        assert step.NAME == name and step.__doc__
