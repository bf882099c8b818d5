"""A small corpus of many documents, and its data set."""

import json
import random

import pytest

from warploom.data.shards import tokenize_corpus


def sentences(seed: int, count: int) -> str:
    rng = random.Random(seed)
    words = "the a cat dog house river sees finds builds old green and of to in caf\u00e9 \u65e5\u672c".split()
    return "".join(" ".join(rng.choices(words, k=rng.randrange(2, 12))) + ".\n" for _ in range(count))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of three .jsonl files and a .txt, 301 documents, two of them equal."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [sentences(seed, seed % 17 + 1) for seed in range(299)]
    texts.append(texts[7])
    for part in range(3):
        lines = (json.dumps({"text": text}) + "\n" for text in texts[part::3])
        (folder / f"{part}.jsonl").write_text("".join(lines))
    (folder / "last.txt").write_text(sentences(1000, 100))
    return folder


@pytest.fixture(scope="session")
def dataset(corpus, tmp_path_factory):
    return tokenize_corpus(corpus, tmp_path_factory.mktemp("tokens") / "set", vocab_size=400, heldout_fraction=0.2)
