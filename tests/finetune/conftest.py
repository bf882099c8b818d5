"""A base model that has learned to go on with a made-up text, and examples in words that it knows."""

import json
import random

import pytest

from warploom.data.shards import tokenize_corpus
from warploom.models.config import TransformerConfig
from warploom.models.transformer import Transformer
from warploom.train.config import OptimizerConfig, RunConfig, TrainConfig
from warploom.train.trainer import Trainer

WORDS = ["ba", "du", "ki", "lo", "me", "po", "su", "ta"]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The run folder of the base, with its token shards."""
    import torch

    folder = tmp_path_factory.mktemp("base")
    chance = random.Random(0)
    text = folder / "text"
    text.mkdir()
    for number in range(40):
        lines = (" ".join(chance.choices(WORDS[number % 4 :: 2], k=8)) for _ in range(30))
        (text / f"{number}.txt").write_text("\n".join(lines))
    run = folder / "run"
    dataset = tokenize_corpus([str(text)], run / "data", vocab_size=280, heldout_fraction=0.1, workers=1)
    config = RunConfig(
        model=TransformerConfig(
            vocab_size=dataset.tokenizer.vocab_size, d_model=32, num_layers=2, num_heads=2, max_seq_len=64
        ),
        train=TrainConfig(
            out_dir=run, steps=60, seq_len=32, global_batch_size=8, micro_batch_size=8, device="cpu", threads=1
        ),
        optimizer=OptimizerConfig(name="adamw", lr=5e-3),
    )
    torch.manual_seed(0)
    Trainer(Transformer(config.model), dataset, config).fit()
    return run


@pytest.fixture(scope="session")
def instructions(tmp_path_factory):
    """300 conversations: the question is one word, some times over; the answer is the word after it in WORDS."""
    file = tmp_path_factory.mktemp("instructions") / "talk.jsonl"
    chance = random.Random(1)
    with file.open("w") as out:
        for _ in range(300):
            number, times = chance.randrange(len(WORDS)), chance.randint(1, 9)
            question, answer = " ".join([WORDS[number]] * times), WORDS[(number + 1) % len(WORDS)]
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": messages}) + "\n")
    return file


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """200 pairs: of two answers, the one that names the word "ba" is chosen."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    chance = random.Random(2)
    with file.open("w") as out:
        for _ in range(200):
            question = " ".join(chance.choices(WORDS, k=2))
            rest = chance.choice(WORDS[1:])
            row = {"prompt": question, "chosen": f"ba {rest}", "rejected": f"{rest} du"}
            out.write(json.dumps(row) + "\n")
    return file


@pytest.fixture
def short(tmp_path):
    """Settings of a run of a few steps, with changes."""

    def make(**changes):
        values = {"steps": 6, "seq_len": 64, "global_batch_size": 4, "micro_batch_size": 2, "eval_every": 3}
        return TrainConfig(**{"out_dir": tmp_path / "out", **values, "device": "cpu", "threads": 1, **changes})

    return make
