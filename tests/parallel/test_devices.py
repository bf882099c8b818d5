"""Plain model parallelism. Without several GPUs there are two halves of a proof: on one device moving is the identity,
so the spread model must train to the same bits; and tensors without memory, on GPUs that do not exist, must never meet
one of another GPU in an operator."""

import dataclasses
import weakref
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from warploom.cli.main import main
from warploom.errors import UserError
from warploom.models.config import TransformerConfig
from warploom.models.recompute import NOTHING, PRODUCTS, keep
from warploom.models.transformer import Transformer
from warploom.nn.attention import AttentionContext
from warploom.optim import OptimizerConfig, build_optimizers
from warploom.parallel import ParallelConfig
from warploom.parallel.devices import _ContextOn, spread

SMALL = TransformerConfig(d_model=32, num_layers=5, num_heads=4, vocab_size=61, max_seq_len=16, dropout=0.1)
MODELS = {
    "decoder": SMALL,
    "learned positions, post-norm": dataclasses.replace(SMALL, position="learned", norm_position="post"),
    "ALiBi, parallel block, untied": dataclasses.replace(
        SMALL, position="alibi", parallel_block=True, tie_embeddings=False
    ),
    "encoder-decoder": dataclasses.replace(
        SMALL, architecture="encoder-decoder", position="t5", num_layers=3, output_bias=True, embedding_norm=True
    ),
}
GPUS = [torch.device("cuda", index) for index in range(3)]


def inputs_of(config):
    tokens = torch.randint(config.vocab_size, (4, 17))
    inputs = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    if config.architecture == "encoder-decoder":
        inputs |= {"source": tokens[:, :11], "source_lengths": torch.full((4,), 9)}
    else:
        offsets = torch.arange(0, 65, 16, dtype=torch.int32)
        inputs |= {"cu_seqlens": offsets, "positions": torch.arange(16).expand(4, 16)}
    return inputs


def trained(config, devices, optimizer="adamw", kept=None):
    torch.manual_seed(5)
    model = Transformer(config)
    if devices:
        spread(model, devices)
    keep(model, kept)
    optimizers = build_optimizers(model, OptimizerConfig(name=optimizer), muon_dtype=torch.float32)
    losses = []
    for _ in range(3):
        model.zero_grad()
        loss = model.loss(**inputs_of(config))
        loss.backward()
        for one in optimizers:
            one.step()
        losses.append(loss.item())
    return losses, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("kept", [None, NOTHING, PRODUCTS], ids=["none", "blocks", "ops"])
@pytest.mark.parametrize("name", MODELS)
def test_a_spread_model_trains_to_the_same_bits(name, kept):
    losses, weights = trained(MODELS[name], [torch.device("cpu")] * 3, "muon", kept)
    expected_losses, expected = trained(MODELS[name], [], "muon", kept)
    assert losses == expected_losses and len(set(losses)) == 3
    assert all(map(torch.equal, weights, expected))


def move(module, device):
    """nn.Module.to, which swaps tensors where these without memory cannot be swapped."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(parameter.detach().to(device))


def on_imaginary_gpus(config, leave_out=None):
    """One forward pass, which is as far as imaginary GPUs go: autograd wants real ones, and so does an index, which
    biases by distance and the output bias come with. Returns model and loss."""
    config = dataclasses.replace(config, output_bias=False)
    if config.position in ("alibi", "t5"):
        config = dataclasses.replace(config, position="rotary")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), mock.patch.object(nn.Module, "to", move):
        model = Transformer(config)
        spread(model, GPUS)
        if leave_out is not None:
            leave_out(model)
        inputs = {name: value.to(GPUS[0]) for name, value in inputs_of(config).items()}
        return model, model.loss(**inputs)


@pytest.mark.parametrize("name", MODELS)
def test_no_tensor_meets_one_of_another_device(name):
    model, loss = on_imaginary_gpus(MODELS[name])
    blocks = [*(model.encoder.blocks if model.encoder is not None else []), *model.stack.blocks]
    places = [{p.device for p in block.parameters()} for block in blocks]
    assert places == [{GPUS[index]} for index in ([0, 0, 1, 1, 2, 2] if len(blocks) == 6 else [0, 1, 1, 2, 2])]
    rest = {name: p for name, p in model.named_parameters() if ".blocks." not in name}
    assert rest and {loss.device, *(p.device for p in rest.values())} == {GPUS[0]}


@pytest.mark.parametrize("hooks", ["_forward_hooks", "_forward_pre_hooks"])
def test_without_the_moves_they_meet(hooks):
    """The control: imaginary GPUs notice."""

    def leave_out(model):
        for block in model.stack.blocks:
            getattr(block, hooks).clear()

    with pytest.raises((RuntimeError, ValueError), match="found two different devices|must be on cuda:"):
        on_imaginary_gpus(MODELS["encoder-decoder"], leave_out)


def test_all_of_a_context_is_moved_once_and_let_go():
    tensors = {
        field.name: torch.ones(2)
        for field in dataclasses.fields(AttentionContext)
        if field.name not in ("rotate", "causal", "cache")
    }
    context = AttentionContext(rotate=torch.add, causal=True, **tensors)
    bring = _ContextOn(torch.device("meta"))
    *_, first = bring(nn.Module(), (None, None, context))
    *_, second = bring(nn.Module(), (None, None, context))
    assert first is second and first.causal and first.rotate is torch.add
    assert {getattr(first, name).device.type for name in tensors} == {"meta"}
    moved = weakref.ref(first)
    del first, second, context
    assert moved() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_and_the_cpu_train_as_the_cpu():
    config = dataclasses.replace(SMALL, dropout=0.0)
    losses, weights = trained(config, [torch.device("cpu"), torch.device("cuda", 0)])
    expected_losses, expected = trained(config, [])
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    assert {w.device.type for w in weights} == {"cpu", "cuda"}


def test_more_devices_than_there_are(tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text("some words of a text, again and again.\n\n" * 400)
    argv = ["train", "--data", str(text), "--train.out-dir", str(tmp_path / "run"), "--train.device", "cpu"]
    assert main([*argv, "--preset", "nano", "--parallel.devices", "2", "--train.steps", "1"]) == 2
    assert "parallel.devices is 2, and this process has 1 (cpu); give parallel.devices 1" in capsys.readouterr().err


def test_sizes_that_cannot_be():
    with pytest.raises(UserError, match="parallel.devices is 0; give 1 or more"):
        ParallelConfig(devices=0)
    with pytest.raises(UserError, match="parallel.devices is 7, and the model has 5 blocks; give parallel.devices 5"):
        ParallelConfig(devices=7).check_model(SMALL, 16)
    with pytest.raises(UserError, match="GPUs of one process, and there are 4; leave it out, or start one process"):
        ParallelConfig(devices=2).resolve(4)
