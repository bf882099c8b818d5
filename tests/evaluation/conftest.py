"""Small checkpoints of random weights, and a folder of task files of a few items in the official forms."""

import json

import pytest
import torch

from warploom.checkpoint.format import CheckpointState
from warploom.checkpoint.save import save_checkpoint
from warploom.data.tokenizer import Tokenizer
from warploom.models.config import TransformerConfig
from warploom.models.transformer import Transformer
from warploom.train.config import RunConfig, TrainConfig

TEXT = "Question: what is a plant that grows in the sun? Answer: the green leaf, and the other one. naïve café 你好 "


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train([TEXT * 5], 320)


@pytest.fixture(scope="session")
def make_model(tokenizer):
    def make(seed=0, **changes):
        torch.manual_seed(seed)
        values = {"d_model": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "init_std": 0.3, **changes}
        values = {"vocab_size": tokenizer.vocab_size, "max_seq_len": 512, **values}
        return Transformer(TransformerConfig(**values)).eval()

    return make


@pytest.fixture(scope="session")
def make_checkpoint(make_model, tokenizer, tmp_path_factory):
    """Save a model of random weights; returns its step-... folder."""

    def make(name="run", seed=0, **changes):
        model = make_model(seed, **changes)
        out = tmp_path_factory.mktemp("checkpoints") / name
        config = RunConfig(model=model.config, train=TrainConfig(out_dir=out, seq_len=32))
        state = CheckpointState(
            step=7, weights=model.state_dict(), meta={"config": config.to_dict()}, tokenizer=tokenizer.to_bytes()
        )
        return save_checkpoint(out, state)

    return make


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory):
    """Made-up items of ARC, HellaSwag, MMLU and TruthfulQA."""
    folder = tmp_path_factory.mktemp("tasks")
    arc = [
        {
            "id": f"q{n}",
            "question": {
                "stem": f"what is plant {n}?",
                "choices": [{"text": text, "label": label} for label, text in zip("ABC", words, strict=True)],
            },
            "answerKey": "ABC"[n % 3],
        }
        for n, words in enumerate([["the sun", "a leaf", "green"], ["one", "the other one", "café"]] * 4)
    ]
    write_lines(folder / "arc" / "ARC-Easy-Test.jsonl", arc)
    write_lines(folder / "arc" / "ARC-Easy-Train.jsonl", arc[:3])
    hellaswag = {
        "activity_label": "Plants",
        "ctx_a": "The sun is out.",
        "ctx_b": "a leaf",
        "endings": ["grows [step] fast.", "is green.", "sings.", "is a 你好."],
        "label": 1,
    }
    write_lines(folder / "hellaswag_val.jsonl", [hellaswag, {**hellaswag, "label": "3"}])
    for split, rows in (("dev", 5), ("test", 4)):
        for subject in ("plant_science", "logic"):
            file = folder / "mmlu" / split / f"{subject}_{split}.csv"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(
                "".join(f'"Is {n}, a leaf {split}?",yes,no,"a, b",both,{"ABCD"[n % 4]}\n' for n in range(rows))
            )
    truthful = [
        {
            "question": f"Is leaf {n} green?",
            "mc1_targets": {"Yes.": 1, "No.": 0, "It is the sun.": 0},
            "mc2_targets": {"Yes.": 1, "It is green.": 1, "No.": 0, "It is the sun.": 0},
        }
        for n in range(3)
    ]
    (folder / "mc_task.json").write_text(json.dumps(truthful))
    return folder


def write_lines(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
