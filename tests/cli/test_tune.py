"""`warploom tune`: what it says where there is nothing to tune for."""

import pytest
import torch

from warploom.cli.main import main


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "no NVIDIA GPU"),
        (["--preset", "gpt3"], "gpt3"),
        (["--seq-len", "0"], "seq_len must be at least 1, got 0"),
    ],
)
def test_it_refuses_in_one_sentence(flags, said, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["tune", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
