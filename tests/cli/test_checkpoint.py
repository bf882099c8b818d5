"""`warploom checkpoint`: inspect, verify, export."""

import json
import os

import pytest
import safetensors.torch
import torch
from tests.checkpoint.states import make_state
from tests.checkpoint.thread_ranks import share, together

from warploom.checkpoint.format import CheckpointState
from warploom.checkpoint.ranks import save_over_ranks
from warploom.checkpoint.save import save_checkpoint
from warploom.cli.main import main
from warploom.interchange import hugging_face
from warploom.models.config import TransformerConfig
from warploom.models.transformer import Transformer
from warploom.train.config import ParallelConfig, RunConfig


@pytest.fixture
def run_dir(tmp_path):
    for step in (3, 12):
        save_checkpoint(tmp_path / "run", make_state(step, heldout_loss=1.25))
    return tmp_path / "run"


def output(capsys, *argv, code=0):
    assert main(["checkpoint", *map(str, argv)]) == code
    return capsys.readouterr().out


def test_inspect_shows_the_newest_of_a_run(run_dir, capsys):
    out = output(capsys, "inspect", run_dir)
    assert out == output(capsys, "inspect", run_dir / "step-00000012")
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert lines["step"].split() == ["step", "12"] and "1.2500 nats per token" in lines["held-out loss"]
    assert "one process" in lines["layout"]
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert lines[name].split() == [name, f"{(run_dir / 'step-00000012' / name).stat().st_size:,}"]
    assert "  embedding.weight" in out and " F32   48 x 24\n" in out and " BF16  24 x 24\n" in out
    assert "optimizer: 8 tensors, 4,178 numbers" not in out  # the check below is no accident
    assert f"optimizer: 8 tensors, {2 * (48 * 24 + 24 + 1 + 0):,} numbers" in out
    assert "adamw/scale/exp_avg" not in out


@pytest.mark.parametrize(
    ("parallel", "said"),
    [({}, "one process"), ({"data": 2, "tensor": 3}, "data 2, tensor 3"), ({"devices": 4}, "devices 4")],
)
def test_inspect_says_the_layout(tmp_path, capsys, parallel, said):
    config = RunConfig(parallel=ParallelConfig(**parallel)).to_dict()
    path = save_checkpoint(tmp_path, CheckpointState(1, {}, meta={"config": config}))
    (line,) = [line for line in output(capsys, "inspect", path).splitlines() if line.startswith("layout")]
    assert line.split(maxsplit=1)[1] == said


def test_inspect_shows_in_how_many_parts_a_tensor_lies(tmp_path, capsys):
    together(2, lambda r: save_over_ranks(tmp_path, share(make_state(3), r.rank, 2), r))
    out = output(capsys, "inspect", tmp_path)
    assert "  F32   48 x 24  in 2 parts\n" in out and "weights: 6 tensors" in out and "version 2" in out
    assert "model.rank00001.safetensors" in out and "sound: 9 files" in output(capsys, "verify", tmp_path)


def test_inspect_lists_all_tensors_or_none(run_dir, capsys):
    everything, nothing = (output(capsys, "inspect", run_dir, "--tensors", kind) for kind in ("all", "none"))
    assert "adamw/scale/exp_avg " in everything and "  torch.cpu " in everything
    assert "embedding.weight" not in nothing and "weights: 6 tensors" in nothing


def test_verify_names_the_tensor_and_the_exit_code_says_so(run_dir, capsys):
    assert output(capsys, "verify", run_dir).count("sound: 6 files, 15 tensors") == 2
    path = run_dir / "step-00000003" / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    newest, oldest = output(capsys, "verify", run_dir, code=1).splitlines()
    assert newest.startswith("step-00000012  sound")
    assert "not sound" in oldest and "optimizer.safetensors: tensor 'adamw/scale/exp_avg_sq'" in oldest
    assert output(capsys, "verify", run_dir / "step-00000012").count("sound") == 1


@pytest.mark.parametrize("action", ["inspect", "verify"])
def test_what_is_no_checkpoint(tmp_path, capsys, action):
    for path, words in ((tmp_path, "neither a checkpoint nor a run folder"), (tmp_path / "x", "no checkpoint at")):
        assert main(["checkpoint", action, str(path)]) == 2
        assert words in capsys.readouterr().err


def test_export_as_safetensors_and_for_hugging_face(tmp_path, capsys):
    torch.manual_seed(0)
    model = Transformer(
        TransformerConfig(vocab_size=31, d_model=16, num_layers=1, num_heads=2, position="rotary", activation="swiglu",
                          norm="rms_norm", bias=False, max_seq_len=256)
    )  # fmt: skip
    config = RunConfig(model=model.config)
    state = CheckpointState(1, model.state_dict(), meta={"config": config.to_dict()})
    path = save_checkpoint(tmp_path / "run", state)
    out = output(capsys, "export", path, tmp_path / "own", "--format", "safetensors")
    assert out.split() == ["written", str(tmp_path / "own")]
    own = safetensors.torch.load_file(tmp_path / "own" / "model.safetensors")
    assert own.keys() == state.weights.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in state.weights.items())
    assert RunConfig.from_dict(json.loads((tmp_path / "own" / "config.json").read_text())) == config
    assert sorted(os.listdir(tmp_path / "own")) == ["config.json", "model.safetensors"]
    output(capsys, "export", path, tmp_path / "hf", "--format", "hf")
    back = hugging_face.import_model(tmp_path / "hf").model
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in state.weights.items())
    for folder, format in (("own", "safetensors"), ("hf", "hf")):
        assert main(["checkpoint", "export", str(path), str(tmp_path / folder), "--format", format]) == 2
        assert "already holds" in capsys.readouterr().err
