import json
import random

import numpy as np
import pytest

from warploom.curate.audit import homographs
from warploom.curate.provenance import documents_of, seen_mix, trace
from warploom.data.dataset import TokenDataset
from warploom.data.loader import Loader
from warploom.errors import UserError

WORDS = [f"word{i}" for i in range(200)]


@pytest.fixture
def run(curate, write_documents):
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randrange(20, 60))) for _ in range(90)]
    first = write_documents("first.jsonl", [f"{text}\u2026" for text in texts[:60]])
    second = write_documents("second.jsonl", texts[60:])
    return curate(
        f"""
[[source]]
name = "first"
paths = ["{first}"]
[[source]]
name = "second"
paths = ["{second}"]
weight = 3
[[step]]
use = "punctuation"
[tokens]
vocab_size = 300
""".replace('name = "first"', 'name = "first"\nweight = 1')
    )


def test_every_token_leads_back_to_its_record(run):
    dataset = TokenDataset(run.folder / "tokens")
    for side, split in (("train", dataset.train), ("heldout", dataset.heldout)):
        rng = random.Random(0)
        for token in [0, split.num_tokens - 1, *(rng.randrange(split.num_tokens) for _ in range(25))]:
            origin = trace(run.folder, token, side)
            with open(origin.file, encoding="utf-8") as file:
                text = json.loads(file.readlines()[origin.record - 1])["text"].replace("\u2026", "...")
            ids = [dataset.tokenizer.eos_id, *dataset.tokenizer.encode(text)]
            assert split.read(np.array([token]), 1)[0, 0] == ids[origin.offset]
            assert origin.steps == ("punctuation",)
            assert origin.edits == (("punctuation",) if origin.source == "first" else ())


def test_repeats_say_their_epoch(run):
    dataset = TokenDataset(run.folder / "tokens")
    epochs = {trace(run.folder, int(start)).epoch for start in dataset.train.document_starts[::3]}
    assert epochs >= {0, 1}


def test_a_token_that_is_not_there_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="is not among the"):
        trace(run.folder, 10**9)
    with pytest.raises(UserError, match="no tokens with a provenance"):
        trace(tmp_path, 0)


def test_the_mix_that_was_seen_is_that_of_the_loaders_windows(run):
    """Counted token by token from what a loader has really given."""
    dataset = TokenDataset(run.folder / "tokens")
    split, samples, seq_len = dataset.train, 37, 50
    loader = Loader(split, seq_len=seq_len, micro_batch_size=1, seed=5)
    given = [next(loader).tokens.numpy()[0] for _ in range(samples)]
    again = Loader(split, seq_len=seq_len, micro_batch_size=1, seed=5)
    starts = again.next_starts()[:samples]
    assert all(np.array_equal(split.read(np.array([s]), seq_len)[0], row) for s, row in zip(starts, given, strict=True))
    counts = {"first": 0, "second": 0}
    for start in starts.tolist():
        for token in range(start, start + seq_len):
            counts[trace(run.folder, token % split.num_tokens).source] += 1 if token % 10 == 0 else 0
    shares = seen_mix(run.folder, samples, seq_len=seq_len, seed=5)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["second"] == pytest.approx(counts["second"] / sum(counts.values()), abs=0.1)
    everything = seen_mix(run.folder, split.num_tokens // seq_len, seq_len=seq_len, seed=5)
    assert everything["second"] == pytest.approx(run.manifest()["mix"]["sources"]["second"]["share"], abs=0.01)


def test_words_of_two_meanings_come_first():
    rng = random.Random(0)
    common = [f"c{i}" for i in range(50)]
    shared = [f"s{i}" for i in range(30)]
    topics = {"zoo": [f"z{i}" for i in range(30)], "code": [f"k{i}" for i in range(30)]}

    def documents():
        state = rng.getstate()
        for source, own in topics.items():
            for _ in range(300):
                words = rng.choices(common, k=120)
                # "python" stands among each source's own words, the shared words among themselves.
                words[10:15] = [*rng.choices(own, k=2), "python", *rng.choices(own, k=2)]
                for place in range(20, 110, 6):
                    words[place : place + 2] = rng.choices(shared, k=2)
                yield source, " ".join(words)
        rng.setstate(state)

    found = homographs(documents, min_count=20)
    assert found[0].word == "python" and found[0].sources == ("code", "zoo")
    assert found[0].agreement < 0.5 < 0.8 < found[1].agreement
    with pytest.raises(UserError, match="compares the words of sources"):
        homographs(lambda: iter([("only", "text")]))


def test_documents_of_a_run(run, tmp_path):
    assert {row["source"] for row in documents_of(run.folder)} == {"first", "second"}
    with pytest.raises(UserError, match="no finished run"):
        list(documents_of(tmp_path))
