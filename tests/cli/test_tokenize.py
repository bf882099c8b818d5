"""warploom tokenize: figures on stdout, one sentence and exit code 2 for bad input."""

import pytest

from warploom.cli.main import main
from warploom.data.shards import TokenDataset


@pytest.fixture
def text(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {i} of a small text\n\n" for i in range(2000)))
    return tmp_path / "a.txt"


def test_it_writes_the_data_set_and_prints_its_figures(text, tmp_path, capsys):
    assert main(["tokenize", str(text), "--out", str(tmp_path / "set"), "--vocab-size", "3000", "--workers", "1"]) == 0
    dataset = TokenDataset(tmp_path / "set")
    output = capsys.readouterr().out
    assert f"{tmp_path}/set: 1 files, 1 documents" in output
    assert f"{dataset.train.num_tokens:,} tokens" in output and f"{dataset.heldout.num_bytes:,} bytes" in output
    assert "held out by the hash of each block" in output
    assert f"note: the vocabulary has {dataset.tokenizer.vocab_size} tokens of the 3000 asked for" in output


def test_it_takes_a_tokenizer_that_exists(text, tmp_path, capsys):
    assert main(["tokenize", str(text), "--out", str(tmp_path / "one"), "--vocab-size", "300"]) == 0
    flags = ["--out", str(tmp_path / "two"), "--tokenizer", str(tmp_path / "one"), "--heldout-fraction", "0.6"]
    assert main(["tokenize", str(text), *flags]) == 0
    one, two = TokenDataset(tmp_path / "one"), TokenDataset(tmp_path / "two")
    assert one.tokenizer.sha256 == two.tokenizer.sha256
    assert two.heldout.num_bytes > one.heldout.num_bytes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere.txt"], "nowhere.txt does not exist"),
        (["{text}", "--vocab-size", "10"], "vocab-size must be at least 257, one per byte and one more, got 10"),
        (
            ["{text}", "--tokenizer", "nowhere.json"],
            "cannot read the tokenizer nowhere.json: No such file or directory",
        ),
        (["{text}", "--heldout-fraction", "2"], "heldout-fraction must be between 0 and 1, got 2.0; 0.05 is usual"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(text, tmp_path, capsys, flags, message):
    flags = [flag.format(text=text) for flag in flags]
    assert main(["tokenize", *flags, "--out", str(tmp_path / "set")]) == 2
    assert capsys.readouterr().err == f"warploom: {message}\n"
    assert not (tmp_path / "set").exists()
