import gzip
import json

import pytest

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
        ("IBAN GB82 WEST 1234 5698 7654 32 please", [("GB82 WEST 1234 5698 7654 32", "iban")]),
        ("IBAN GB82 WEST 1234 5698 7654 33 please", []),
        ("SSN 219-09-9999", [("219-09-9999", "ssn")]),
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


LABELS = {
    "CREDIT_CARD": "card",
    "PHONE_NUMBER": "phone",
    "EMAIL_ADDRESS": "email",
    "IBAN_CODE": "iban",
    "US_SSN": "ssn",
    "IP_ADDRESS": "ip",
}


def test_precision_and_recall_on_labelled_sentences(shared_data):
    """The figures of docs/data.md."""
    with gzip.open(shared_data / "web" / "presidio_synth_dataset_v2.json.gz") as file:
        sentences = json.load(file)
    hits = dict.fromkeys(LABELS.values(), 0)
    found = dict.fromkeys(KINDS, 0)
    labelled = dict.fromkeys(LABELS.values(), 0)
    right = dict.fromkeys(KINDS, 0)
    for sentence in sentences:
        gold = [
            (span["start_position"], span["end_position"], LABELS[span["entity_type"]])
            for span in sentence["spans"]
            if span["entity_type"] in LABELS
        ]
        got = list(find(sentence["full_text"], private_addresses=True))
        for start, end, kind in got:
            found[kind] += 1
            right[kind] += any(kind == k and start < b and a < end for a, b, k in gold)
        for start, end, kind in gold:
            labelled[kind] += 1
            hits[kind] += any(kind == k and start < b and a < end for a, b, k in got)
    for kind, number in labelled.items():
        assert number >= 14
        assert hits[kind] >= 0.97 * number, (kind, hits[kind], number)
        assert right[kind] >= 0.97 * found[kind], (kind, right[kind], found[kind])


def test_prose_has_no_personal_data(shared_data):
    """30 MB of novels older than the telephone: whatever is found is wrong."""
    import lzma

    with lzma.open(shared_data / "corpora" / "novels-en.jsonl.xz") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(10), strict=False)]
    assert sum(map(len, texts)) > 3_000_000
    assert [item for text in texts for item in kinds(text)] == []
