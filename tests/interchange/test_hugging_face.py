"""Import and export against transformers itself, and what is refused."""

import json
import warnings

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tests.interchange.architectures import ARCHITECTURES, build, our_output, their_output

from warploom.errors import UserError
from warploom.interchange.hugging_face import FAMILIES, export_model, import_model
from warploom.models import Transformer, TransformerConfig, preset

TOLERANCE = dict(atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_transformers_both_ways(name, tmp_path):
    theirs = build(name)
    expected = their_output(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    imported = import_model(tmp_path / "theirs")
    torch.testing.assert_close(our_output(imported.model), expected, **TOLERANCE)
    assert expected.abs().max() > 0.5  # nothing so small that the tolerance hides it

    export_model(imported.model, tmp_path / "ours", family=theirs.config.model_type, token_ids=imported.token_ids)
    again = type(theirs).from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(their_output(again), expected, **TOLERANCE)
    for token in ("bos", "eos", "pad"):
        assert getattr(again.config, f"{token}_token_id") == getattr(theirs.config, f"{token}_token_id")


def test_every_family_is_among_the_architectures():
    assert {build(name).config.model_type for name in ARCHITECTURES} == set(FAMILIES)


@pytest.mark.parametrize(
    "config, architecture",
    [
        (preset("nano"), "FalconForCausalLM"),
        (TransformerConfig(vocab_size=64, d_model=32, num_heads=2, num_layers=1, activation="swiglu", norm="rms_norm"),
         "LlamaForCausalLM"),
    ],
)  # fmt: skip
def test_a_model_made_here_is_one_of_transformers(config, architecture, tmp_path):
    torch.manual_seed(0)
    model = Transformer(config).eval()
    export_model(model, tmp_path / "out")
    theirs = getattr(hf, architecture).from_pretrained(tmp_path / "out").eval()
    tokens = torch.randint(config.vocab_size, (2, 13))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model.logits(model(tokens)), **TOLERANCE)


@pytest.fixture
def llama(tmp_path):
    build("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_shards_and_half_precision_are_read(llama, tmp_path):
    whole = import_model(llama).model.state_dict()
    build("llama").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for name, tensor in import_model(tmp_path / "shards").model.state_dict().items():
        assert torch.equal(tensor, whole[name])
    build("llama").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    half = import_model(tmp_path / "half").model.state_dict()
    assert all(torch.equal(half[name], tensor.bfloat16().float()) for name, tensor in whole.items())


def test_a_checkpoint_without_output_layer_is_a_tied_model(tmp_path):
    build("gpt2").transformer.save_pretrained(tmp_path / "bare")
    imported = import_model(tmp_path / "bare")
    torch.testing.assert_close(our_output(imported.model), their_output(build("gpt2")), **TOLERANCE)


def test_pickles_are_never_opened(llama):
    tensors = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    torch.save(tensors, llama / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin, which may run code"):
        import_model(llama)
    (llama / "pytorch_model.bin").rename(llama / "model.safetensors")
    with pytest.raises(UserError, match="is a pickle or a zip of pickles, which is never opened"):
        import_model(llama)


@pytest.mark.parametrize(
    "values, reason",
    [
        ({"model_type": "mamba"}, "'mamba' model"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "only unscaled ones"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers 'two'"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2"),
        ({"num_hidden_layers": 1}, "does not know: model.layers.1"),
        ({"intermediate_size": 47}, "does not fit the model"),
        ({"hidden_size": 30}, "head_dim|does not divide|does not fit"),
    ],
)
def test_what_is_not_understood_is_refused(llama, values, reason):
    change_config(llama, **values)
    with pytest.raises(UserError, match=reason):
        import_model(llama)


def test_damaged_files_are_refused(llama):
    path = llama / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-4])
    with pytest.raises(UserError, match="its header accounts for"):
        import_model(llama)
    path.write_bytes(data)
    tensors = load_file(path)
    save_file({**tensors, "model.norm.weight": torch.full_like(tensors["model.norm.weight"], float("nan"))}, path)
    with pytest.raises(UserError, match="NaN or infinite"):
        import_model(llama)
    (llama / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        import_model(llama)


def test_a_model_that_no_architecture_has_is_not_exported(tmp_path):
    model = Transformer(TransformerConfig(vocab_size=32, d_model=16, num_heads=2, num_layers=1, position="alibi"))
    with pytest.raises(UserError, match="llama cannot have position 'alibi'.*gpt2 cannot have"):
        export_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="did you mean 'llama'"):
        export_model(model, tmp_path / "out", family="lama")


def test_nothing_is_overwritten(llama, tmp_path):
    model = import_model(llama).model
    with warnings.catch_warnings(), pytest.raises(UserError, match="already holds config.json"):
        export_model(model, llama)
