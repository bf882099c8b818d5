"""What is saved comes back bit for bit, the folder suffices, and other readers of the format agree."""

import json
import os
import re

import pytest
import safetensors.torch
import torch
import xxhash
from tests.checkpoint.states import digest, make_state

from warploom.checkpoint import save
from warploom.checkpoint.format import CheckpointState, list_checkpoints, step_of
from warploom.checkpoint.load import (
    differing_fields,
    find_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    load_latest,
    load_weights,
    load_weights_only,
    verify_checkpoint,
)
from warploom.checkpoint.save import save_checkpoint
from warploom.checkpoint.tensors import DTYPE_CODES
from warploom.errors import UserError


@pytest.mark.parametrize("tokenizer", [True, False])
def test_round_trip(tmp_path, tokenizer):
    state = make_state(42, heldout_loss=1.5, tokenizer=tokenizer)
    path = save_checkpoint(tmp_path / "runs" / "a", state)
    assert path == tmp_path / "runs" / "a" / "step-00000042"
    assert digest(load_checkpoint(path)) == digest(state)
    assert digest(load_checkpoint(path, verify=False)) == digest(state)
    assert digest(load_latest(path.parent)) == digest(state)
    assert (path / "tokenizer.json").exists() == tokenizer
    assert os.listdir(path.parent) == ["step-00000042"]


def test_every_dtype_and_layout(tmp_path):
    weights = {
        str(dtype): torch.arange(-3, 3, dtype=torch.float32).view(2, 3).to(torch.int64).to(dtype)
        for dtype in DTYPE_CODES
    }
    base = torch.randn(4, 6)
    weights |= {"transposed": base.T, "strided": base[:, ::2], "expanded": base[:1].expand(3, 6), "parameter": base}
    weights["parameter"] = torch.nn.Parameter(base)
    loaded = load_checkpoint(save_checkpoint(tmp_path, CheckpointState(step=0, weights=weights))).weights
    assert digest(CheckpointState(0, loaded)) == digest(
        CheckpointState(0, {name: tensor.detach() for name, tensor in weights.items()})
    )


def test_numbers_in_meta_come_back_exactly(tmp_path):
    meta = {
        "lr": 0.1 + 0.2,
        "tiny": 5e-324,
        "big": 2**60 + 1,
        "best": float("inf"),
        "text": "a\u00e9\ud800",
        "none": None,
    }
    path = save_checkpoint(tmp_path, CheckpointState(step=1, weights={}, meta=meta, heldout_loss=float("nan")))
    loaded = load_checkpoint(path)
    assert loaded.meta == {**meta, "config": {}}
    assert loaded.heldout_loss is None


def test_what_no_file_can_hold_is_refused_and_leaves_nothing(tmp_path):
    for state in (
        CheckpointState(step=1, weights={"w": torch.zeros(2, dtype=torch.complex64)}),
        CheckpointState(step=1, weights={}, meta={"object": object()}),
    ):
        with pytest.raises(TypeError):
            save_checkpoint(tmp_path, state)
        assert os.listdir(tmp_path) == []


def test_a_stranger_can_read_it(tmp_path):
    """By the words of format.py alone, with the safetensors library and xxhash."""
    state = make_state(7, heldout_loss=2.25)
    path = save_checkpoint(tmp_path, state)
    assert json.loads((path / "config.json").read_text()) == state.meta["config"]
    assert json.loads((path / "state.json").read_text()) == {"step": 7, "meta": {"loader": state.meta["loader"]}}
    assert (path / "tokenizer.json").read_bytes() == state.tokenizer
    manifest_bytes = (path / "manifest.json").read_bytes()
    assert (path / "manifest.json.xxh3").read_text() == (
        xxhash.xxh3_128_hexdigest(manifest_bytes) + "  manifest.json\n"
    )
    manifest = json.loads(manifest_bytes)
    assert (manifest["format"], manifest["version"], manifest["step"]) == ("warploom checkpoint", 1, 7)
    assert manifest["heldout_loss"] == 2.25
    assert set(os.listdir(path)) == {*manifest["files"], "manifest.json", "manifest.json.xxh3"}
    for name, record in manifest["files"].items():
        data = (path / name).read_bytes()
        assert (len(data), xxhash.xxh3_128_hexdigest(data)) == (record["size"], record["xxh3_128"])
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    assert tensors.keys() == state.weights.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, state.weights[name])
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        record = manifest["files"]["model.safetensors"]["tensors"][name]
        assert record == {
            "dtype": DTYPE_CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "xxh3_128": xxhash.xxh3_128_hexdigest(data),
        }


def test_replacing_a_step_and_sweeping(tmp_path):
    for seed in (1, 2):
        state = make_state(seed)
        state.step = 5
        path = save_checkpoint(tmp_path, state)
    assert digest(load_checkpoint(path)) == digest(state)
    assert os.listdir(tmp_path) == ["step-00000005"]


def test_left_overs_are_ignored_and_swept_once_their_process_is_dead(tmp_path):
    save_checkpoint(tmp_path, make_state(1))
    living = tmp_path / f".tmp-step-00000002-{os.getppid()}"
    own = tmp_path / f".tmp-step-00000002-{os.getpid()}"
    dead = tmp_path / ".tmp-step-00000003-999999999"
    trash = tmp_path / ".trash-step-00000000-1"
    foreign = tmp_path / "notes"
    for folder in (living, own, dead, trash, foreign):
        (folder / "sub").mkdir(parents=True)
    assert latest_checkpoint(tmp_path).name == "step-00000001"
    save_checkpoint(tmp_path, make_state(2))
    assert {path.name for path in tmp_path.iterdir()} == {
        living.name,
        "notes",
        "step-00000001",
        "step-00000002",
    }


def test_order_is_by_step_not_by_time(tmp_path):
    for step in (300, 20, 100000000, 1000):
        path = save_checkpoint(tmp_path, make_state(step, width=4))
        os.utime(path, (10**9 - step, 10**9 - step))
    names = ["step-100000000", "step-00001000", "step-00000300", "step-00000020"]
    (tmp_path / "step-7").mkdir()  # not a name that save gives
    assert [path.name for path in list_checkpoints(tmp_path)] == names
    assert latest_checkpoint(tmp_path).name == names[0]


def test_names():
    assert step_of("step-00000042") == step_of(".replaced-step-00000042") == 42
    for name in ("step-42", "step-000000042", "step-0000004x", ".tmp-step-00000042-7", "step-00000042 "):
        assert step_of(name) is None


def test_weights_only_needs_no_other_tensor_file(tmp_path):
    state = make_state(3)
    path = save_checkpoint(tmp_path, state)
    (path / "optimizer.safetensors").write_bytes(b"damaged")
    (path / "rng.safetensors").unlink()
    loaded = load_weights_only(path)
    assert loaded.optimizer == loaded.rng == {}
    assert all(torch.equal(loaded.weights[name], tensor) for name, tensor in state.weights.items())
    assert (loaded.meta, loaded.tokenizer, loaded.step) == (state.meta, state.tokenizer, 3)
    with pytest.raises(UserError, match="optimizer.safetensors has 7 bytes"):
        load_checkpoint(path)


def test_loaded_weights_do_not_follow_the_file(tmp_path):
    state = make_state(3)
    path = save_checkpoint(tmp_path, state)
    loaded = load_weights_only(path)
    with open(path / "model.safetensors", "r+b") as file:
        file.write(b"\xff" * file.seek(0, os.SEEK_END))
    assert all(torch.equal(loaded.weights[name], tensor) for name, tensor in state.weights.items())


def test_find_checkpoint(tmp_path):
    run = tmp_path / "run"
    first, second = (save_checkpoint(run, make_state(step)) for step in (1, 2))
    assert find_checkpoint(first) == first
    assert find_checkpoint(run) == second
    copy = tmp_path / "favourite"
    second.rename(copy)
    assert find_checkpoint(copy) == copy
    assert load_checkpoint(copy).step == 2


@pytest.mark.parametrize("function", [load_checkpoint, load_weights_only, find_checkpoint, verify_checkpoint])
def test_no_checkpoint_there(tmp_path, function):
    (tmp_path / "model.pt").write_bytes(b"PK\x03\x04")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=re.escape(f"there is no checkpoint at {tmp_path / 'nothing'}")):
        function(tmp_path / "nothing")
    with pytest.raises(UserError, match="is a file, and a checkpoint is a folder; pickled files"):
        function(tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"empty is (not|neither) a checkpoint"):
        function(tmp_path / "empty")


def test_a_run_without_checkpoints(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert load_latest(tmp_path / "missing") is None


def test_load_weights(tmp_path):
    torch.manual_seed(0)
    source, target = (torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3)) for _ in range(2))
    assert not torch.equal(source[0].weight, target[0].weight)
    load_weights(target, source.state_dict())
    x = torch.randn(2, 4)
    assert torch.equal(source(x), target(x))
    with torch.device("meta"):
        empty = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    load_weights(empty, load_checkpoint(save_checkpoint(tmp_path, CheckpointState(1, source.state_dict()))).weights)
    assert torch.equal(empty(x), source(x))
    assert empty[0].weight.requires_grad


def test_load_weights_lists_what_differs():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    other = torch.nn.Sequential(
        torch.nn.Linear(5, 3, bias=False), torch.nn.LayerNorm(3), torch.nn.Linear(3, 3, bias=False)
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_weights(model, other.state_dict())
    for words in (
        "0.bias is missing from the checkpoint",
        "2.weight is not in the model",
        "0.weight is (3, 5) in the checkpoint and (3, 4) in the model",
    ):
        assert words in str(caught.value)
    assert "1.weight" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_nonfinite_weights_are_refused_or_warned_of():
    model = torch.nn.Linear(4, 3).bfloat16()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights["weight"][0, 1:3] = torch.tensor([float("nan"), float("-inf")])
    with pytest.raises(UserError, match="NaN or infinite: weight has 2;"):
        load_weights(model, weights)
    messages = []
    load_weights(model, weights, messages.append)
    assert len(messages) == 1
    assert torch.equal(model.weight, weights["weight"]) is False  # NaN differs from itself
    assert torch.equal(model.weight.isfinite(), weights["weight"].isfinite())


def test_differing_fields():
    saved = {"model": {"d_model": 64, "betas": [0.9, 0.95]}, "seed": 1, "old": True}
    current = {"model": {"d_model": 128, "betas": (0.9, 0.95)}, "seed": 1, "new": None}
    assert differing_fields(saved, current) == [
        "model.d_model: 64 in the checkpoint, 128 now",
        "old: True in the checkpoint, absent now",
        "new: absent in the checkpoint, None now",
    ]
    assert differing_fields(saved, saved) == []


def test_replaced_checkpoint_counts_while_its_successor_is_missing(tmp_path):
    state = make_state(5)
    path = save_checkpoint(tmp_path, state)
    path.rename(tmp_path / ".replaced-step-00000005")
    assert digest(load_latest(tmp_path)) == digest(state)
    save.sweep(tmp_path)
    assert os.listdir(tmp_path) == ["step-00000005"]
    assert digest(load_checkpoint(path)) == digest(state)
