"""The verbs in the order a person uses them, on a small text: train, go on, sample, eval."""

import json
import math
import random

import pytest
import torch

from warploom.cli import sample
from warploom.cli.main import main
from warploom.data.shards import TokenDataset
from warploom.evaluation.perplexity import evaluate
from warploom.train.load_model import load_model

SMALL = [
    *("--model.vocab-size", "300", "--model.d-model", "32", "--model.num-layers", "1", "--model.num-heads", "2"),
    *("--model.max-seq-len", "64", "--train.seq-len", "32", "--train.global-batch-size", "8"),
    *("--train.micro-batch-size", "8", "--train.steps", "12", "--train.eval-every", "6", "--train.device", "cpu"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text of made-up words whose letters alternate, easy to learn something of."""
    draw = random.Random(0)
    words = [
        "".join(draw.choice("bdgklm") + draw.choice("aeiou") for _ in range(draw.randint(1, 4))) for _ in range(300)
    ]
    folder = tmp_path_factory.mktemp("text")
    for number in range(40):
        lines = (" ".join(draw.choices(words, k=12)) + "." for _ in range(40))
        (folder / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run_dir(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--data", str(text), "--train.out-dir", str(out), *SMALL]) == 0
    return out


def test_train_leaves_a_checkpoint_metrics_and_a_report(run_dir):
    assert (run_dir / "step-00000012" / "model.safetensors").is_file()
    assert any((run_dir / "tensorboard").iterdir())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "step"]
    assert len(losses) == 12 and losses[-1] < losses[0]
    assert "report" in (run_dir / "report.html").read_text(encoding="utf-8")


def test_the_same_command_again_does_not_train_again(run_dir, text, capsys):
    before = (run_dir / "step-00000012" / "model.safetensors").read_bytes()
    assert main(["train", "--data", str(text), "--train.out-dir", str(run_dir), *SMALL]) == 0
    out = capsys.readouterr().out
    assert "Going on from step 12" in out and "temperature 0.7" in out and "report.html" in out
    assert (run_dir / "step-00000012" / "model.safetensors").read_bytes() == before


def test_another_model_in_the_same_folder_is_refused(run_dir, text, capsys):
    argv = ["train", "--data", str(text), "--train.out-dir", str(run_dir), *SMALL, "--model.d-model", "64"]
    assert main(argv) == 2
    assert "model.d_model: 32 in the checkpoint, 64 now" in capsys.readouterr().err


def test_sample_continues_the_prompt(run_dir, capsys):
    argv = ["sample", str(run_dir), "--prompt", "bado", "--max-new-tokens", "10", "--temperature", "0"]
    assert main(argv) == 0
    first = capsys.readouterr().out
    assert first.startswith("bado") and len(first) > len("bado\n")
    assert main([*argv, "--no-use-cache"]) == 0
    assert capsys.readouterr().out == first
    assert main(["sample", str(run_dir), "--prompt", "a", "b", "--num-samples", "2", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.count("---\n") == 4


def test_sample_computes_in_the_type_that_was_asked_for(run_dir, capsys, monkeypatch):
    used = []
    right = sample.generate

    def watching(model, *rest, **options):
        used.append((model.compute_dtype, {name: weight.dtype for name, weight in model.state_dict().items()}))
        return right(model, *rest, **options)

    monkeypatch.setattr(sample, "generate", watching)
    for dtype in ("bf16", "fp32"):
        assert main(["sample", str(run_dir), "--prompt", "bado", "--max-new-tokens", "10", "--dtype", dtype]) == 0
        assert capsys.readouterr().out.startswith("bado")
    assert [dtype for dtype, _ in used] == [torch.bfloat16, torch.float32]
    assert set(used[0][1].values()) == {torch.float32}


def test_eval_is_the_loss_of_the_run(run_dir, capsys):
    assert main(["eval", str(run_dir)]) == 0
    out = capsys.readouterr().out
    assert "perplexity" in out and "bits per byte" in out
    loaded = load_model(run_dir)
    found = evaluate(loaded)
    assert loaded.heldout_loss == pytest.approx(found.loss, abs=1e-4)
    dataset = TokenDataset(run_dir / "data")
    assert found.num_targets == dataset.heldout.num_tokens and found.num_bytes == dataset.heldout.num_bytes
    assert found.bits_per_byte == pytest.approx(found.loss * found.num_targets / math.log(2) / found.num_bytes)


def test_eval_of_plain_text_counts_all_of_it(run_dir, text):
    loaded = load_model(run_dir)
    file = text / "3.txt"
    found = evaluate(loaded, [file], batch_size=3)
    content = file.read_text(encoding="utf-8")
    assert found.num_bytes == len(content.encode("utf-8"))
    assert found.num_targets == len(loaded.tokenizer.encode(content)) + 1  # and the end of the text
    assert found.loss == pytest.approx(evaluate(loaded, [file], batch_size=64).loss, rel=1e-5)


def test_eval_refuses_tokens_of_another_tokenizer(run_dir, text, tmp_path, capsys):
    assert main(["tokenize", str(text), "--out", str(tmp_path / "other"), "--vocab-size", "280"]) == 0
    capsys.readouterr()
    assert main(["eval", str(run_dir), "--data", str(tmp_path / "other")]) == 2
    assert "were made by the tokenizer" in capsys.readouterr().err


def test_a_budget_chooses_the_run_and_a_second_command_goes_on_with_it(text, tmp_path, capsys):
    argv = ["train", "--data", str(text), "--budget", "20s", "--train.out-dir", str(tmp_path / "run")]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert out.count("Plan: ") >= 4 and "temperature 1.0" in out
    assert main(argv) == 0
    assert "Going on with what was chosen" in capsys.readouterr().out
