"""`warploom plan`, as a person calls it."""

import pytest

from warploom.cli.main import main
from warploom.cli.plan import count, short
from warploom.errors import UserError


def test_a_preset_on_named_hardware(capsys):
    assert main(["plan", "--preset", "llama2-7b", "--tokens", "2T", "--hardware", "h100", "--devices", "64"]) == 0
    said = capsys.readouterr().out
    for words in (
        "parameters       6,738,415,616",
        "2T (297 per parameter)",
        "products + the causal half",
        "does not fit: weights 26.95, gradients 26.95, optimizer 53.91",
        "host             1.26 GB more per process",
        "cheapest change after which it does: the layout data 8 x shard 8",
        "The fastest layouts that fit:",
        "device-hours",
    ):
        assert words in said


def test_without_a_model_it_answers_the_question(capsys):
    assert main(["plan", "--hardware", "a100-80gb", "--devices", "8"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("How long does it take to train an LLM from scratch?")
    assert "gpt2-xl" in said and "days" in said and "does not fit; " in said


def test_here_is_measured(capsys):
    assert main(["plan", "--preset", "nano", "--tokens", "1M", "--seq-len", "32", "--batch-tokens", "256"]) == 0
    said = capsys.readouterr().out
    assert "timed on models one and two blocks deep" in said and "1M (1 per parameter)" in said and "fits" in said


def test_tokens_are_suggested(capsys):
    assert main(["plan", "--preset", "gpt2", "--hardware", "h100"]) == 0
    assert "2.49B (20 per parameter), where a given compute goes furthest" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hardware", "h1000"], "no device is called 'h1000'"),
        (["--tokens", "many", "--hardware", "h100"], "tokens is 'many'"),
        (["--devices", "2"], "hardware 'here' is one"),
        (["--devices", "0", "--hardware", "h100"], "devices is 0"),
        (["--devices", "6", "--hardware", "h100", "--tensor", "4"], "does not divide 6 devices"),
        (["--seq-len", "9999", "--hardware", "h100"], "more than model.max_seq_len"),
        (["--after", "/nowhere"], "holds no metrics.jsonl"),
    ],
)
def test_mistakes_are_one_sentence(flags, message, capsys):
    assert main(["plan", "--preset", "gpt2", *flags]) == 2
    assert message in capsys.readouterr().err


def test_counts():
    assert [count("tokens", text) for text in ("500M", "2t", "3e11", "0.5B", "7")] == [5e8, 2e12, 3e11, 5e8, 7]
    assert [short(n) for n in (999, 1500, 2.49e9, 2e12)] == ["999", "1.5K", "2.49B", "2T"]
    for text in ("-1", "0", "1X", ""):
        with pytest.raises(UserError, match="write it like"):
            count("tokens", text)
