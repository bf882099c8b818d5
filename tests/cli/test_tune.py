"""`warploom tune`: what it says where there is nothing to tune for, and the step that it would measure."""

import pytest
import torch

from warploom.cli.main import main
from warploom.cli.tune import random_batch, take_a_step
from warploom.models.presets import preset
from warploom.ops import REGISTRY
from warploom.train.config import RunConfig, TrainConfig


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "no NVIDIA GPU"),
        (["--preset", "gpt3"], "gpt3"),
        (["--train.seq-len", "0"], "train.seq_len is 0"),
        (["--budget", "5m"], "name a preset or a configuration"),
    ],
)
def test_it_refuses_in_one_sentence(flags, said, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["tune", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_it_takes_the_configuration_of_a_run(tmp_path, capsys):
    (tmp_path / "notes.toml").write_text('preset = "nano"\n[train]\nseq_len = 48\n[text]\nheldout_fraction = 0.1\n')
    assert main(["tune", "--config", str(tmp_path / "notes.toml"), "--optimizer.name", "muon", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "seq_len = 48" in said and "name = 'muon'" in said


@pytest.mark.parametrize("separate", [True, False])
def test_its_batch_is_one_of_a_run(separate):
    config = RunConfig(preset("nano"), TrainConfig(seq_len=33, micro_batch_size=3, global_batch_size=6,
                                                   separate_documents=separate))  # fmt: skip
    batch = random_batch(config)
    assert batch.tokens.shape == batch.targets.shape == batch.positions.shape == (3, 33)
    if separate:
        assert batch.cu_seqlens.tolist() == [0, 17, 33, 50, 66, 83, 99]
        assert batch.positions[0].tolist() == [*range(17), *range(16)]
    else:
        assert batch.cu_seqlens is None and batch.positions[2].tolist() == list(range(33))


def test_its_step_calls_the_ops_of_a_step():
    for op in REGISTRY.values():
        op.calls.clear()
    take_a_step(RunConfig(preset("nano"), TrainConfig(seq_len=16, global_batch_size=2)), torch.device("cpu"))
    called = {name for name, op in REGISTRY.items() if op.calls}
    assert {"attention", "linear", "linear_cross_entropy", "grad_norm", "adamw"} <= called
