"""A small tokenized corpus for the trainer's tests."""

import random

import pytest

from warploom.data.shards import tokenize_corpus


@pytest.fixture(scope="session")
def tokens(tmp_path_factory):
    """The folder of a token data set: 40 documents of made-up sentences, vocabulary 300."""
    folder = tmp_path_factory.mktemp("corpus")
    chance = random.Random(0)
    words = [f"{a}{b}{c}" for a in ("st", "br", "m", "l") for b in "aeiou" for c in ("nd", "rt", "n", "lk")]
    text = folder / "text"
    text.mkdir()
    for number in range(40):
        sentences = (" ".join(chance.choices(words[number % 8 :: 4], k=chance.randint(3, 12))) for _ in range(20))
        (text / f"{number:02d}.txt").write_text(". ".join(sentences))
    tokenize_corpus([str(text)], folder / "tokens", vocab_size=300, heldout_fraction=0.1, workers=1)
    return folder / "tokens"
