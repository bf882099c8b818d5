import json

import pytest
from bench.curate_accuracy import marked_sentences, presidio_sentences, score_redaction

from warploom.curate.document import Document
from warploom.curate.redact import KINDS, Redact, apply_spans, find


def kinds(text, **options):
    return [(text[start:end], kind) for start, end, kind in find(text, **options)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to jane.doe+x@mail.example.org.", [("jane.doe+x@mail.example.org", "email")]),
        ("not @ home, a@b, x@logo.png", []),
        ("call +44 20 7946 0958 now", [("+44 20 7946 0958", "phone")]),
        ("dial (415) 555-2671 x12", [("(415) 555-2671 x12", "phone")]),
        ("on 2024-05-17 and 17.05.2024, in 1939-1945", []),
        ("pages 1234567 of 7654321, ISBN 978-3-16-148410-0", []),
        ("from 8.8.8.8 port 53", [("8.8.8.8", "ip")]),
        ("version 1.2.3.4.5 of 999.1.1.1, at 12:30:45", []),
        ("from 2001:4860:4860::8888 it came", [("2001:4860:4860::8888", "ip")]),
        ("card 4111 1111 1111 1111!", [("4111 1111 1111 1111", "card")]),
        ("order 4111 1111 1111 1112", []),
        ("4111 1111 1111 1111 09/27 CVV 112", [("4111 1111 1111 1111", "card")]),
        ("pan=4111111111111111&exp=0927, id=4111111111111111&x=1", [("4111111111111111", "card")]),
        ("e is 2.718281828459045, EAN 5 901234 123457", []),
        ("IBAN GB82 WEST 1234 5698 7654 32 please", [("GB82 WEST 1234 5698 7654 32", "iban")]),
        ("IBAN GB82 WEST 1234 5698 7654 33 please", []),
        ("SSN 219-09-9999", [("219-09-9999", "ssn")]),
        ("lot 219099998, my social (219 09 9999)", [("219 09 9999", "ssn")]),
        ("section 4.2.1.7, the call centre took 1 250 400 calls", []),
        ("SSN 000-12-3456 or 666-12-3456 or 900-12-3456", []),
        ("key AKIAIOSFODNN7EXAMPLE here", [("AKIAIOSFODNN7EXAMPLE", "key")]),
        ("ghp_" + "a" * 36, []),
        ("", []),
    ],
)
def test_what_is_found(text, expected):
    assert kinds(text) == expected


def test_positions_are_those_of_characters():
    text = "\u00fc\U0001f600\u4e2d jane@mail.example \u00e9\u00e9 8.8.4.4"
    assert kinds(text) == [("jane@mail.example", "email"), ("8.8.4.4", "ip")]


def test_private_addresses_are_asked_for():
    assert kinds("at 192.168.0.1") == []
    assert kinds("at 192.168.0.1", private_addresses=True) == [("192.168.0.1", "ip")]


def test_only_the_kinds_that_were_asked_for():
    document = Document(text="jane@mail.example 8.8.8.8", id="1")
    step = Redact(kinds=("ip",))
    step.apply(document)
    assert apply_spans(document.text, document.spans) == "jane@mail.example <IP>"
    assert step.stats.counts == {"ip": 1}


def test_hostile_text_is_scanned_in_linear_time():
    """Long runs that send a backtracking pattern into squares and worse; the test's time limit is the judge."""
    for text in ("1" * 300_000, "a." * 150_000 + "@", "1 " * 150_000, "a@" * 150_000, ":" * 300_000, "GB82 " * 60_000):
        list(find(text))


def test_private_key_blocks_go_whole():
    text = "-----BEGIN RSA PRIVATE KEY-----\nMIIB\nAAAA==\n-----END RSA PRIVATE KEY-----\nrest"
    ((found, kind),) = kinds(text)
    assert kind == "key" and found.endswith("END RSA PRIVATE KEY-----")


# Set of sentences -> kind -> the least precision and recall that the rules are held to. "presidio" and "mended_with"
# were at hand when rules were written; "unseen" was made before the last rules were, and no rule was changed for it.
FLOORS = {
    "presidio": {kind: (0.97, 0.97) for kind in ("email", "phone", "ip", "card", "iban", "ssn")},
    "mended_with": {kind: (0.97, 0.94) for kind in KINDS},
    "unseen": {**{kind: (0.97, 0.95) for kind in KINDS}, "ip": (0.9, 0.97)},
}


@pytest.mark.parametrize("name", FLOORS)
def test_precision_and_recall_on_labelled_sentences(name, request):
    """The figures of docs/data.md."""
    if name == "presidio":
        request.getfixturevalue("shared_data")
        counts = score_redaction(presidio_sentences(), private_addresses=True)
    else:
        counts = score_redaction(marked_sentences(name), private_addresses=False)
    for kind, (precision, recall) in FLOORS[name].items():
        count = counts[kind]
        assert count["labelled"] >= 14
        assert count["recalled"] >= recall * count["labelled"], (kind, count)
        assert count["right"] >= precision * count["found"], (kind, count)


def test_prose_has_no_personal_data(shared_data):
    """30 MB of novels older than the telephone: whatever is found is wrong."""
    import lzma

    with lzma.open(shared_data / "corpora" / "novels-en.jsonl.xz") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(10), strict=False)]
    assert sum(map(len, texts)) > 3_000_000
    assert [item for text in texts for item in kinds(text)] == []
