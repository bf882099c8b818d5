"""LoRA on the model's own layers: it begins as nothing, is what its formula says, and goes into the weight and out."""

import pytest
import torch

from warploom.errors import UserError
from warploom.models.config import TransformerConfig
from warploom.models.transformer import Transformer
from warploom.nn.attention import SelfAttention
from warploom.nn.linear import Linear, keep_packed
from warploom.nn.lora import LoRAConfig, LoRALinear, add_lora, bake_lora, lora_layers, merge_lora, unmerge_lora
from warploom.optim import OptimizerConfig, build_optimizers


def small_model(**changes):
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=31, d_model=16, num_layers=2, num_heads=2, max_seq_len=12, **changes)
    return Transformer(config)


def stir(model):
    """Give every adapter something to say."""
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_b, std=0.3)


TOKENS = torch.arange(20).view(2, 10)


@pytest.mark.parametrize("activation", ["none", "relu", "relu2", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_is_its_formula(activation, bias):
    from warploom.ops.linear import ACTIVATIONS

    base = Linear(6, 5, bias, dtype=torch.float64, activation=activation)
    layer = LoRALinear(base, LoRAConfig(rank=3, alpha=6.0))
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
    expected = ACTIVATIONS[activation](plain + 2.0 * (x @ layer.lora_a.T) @ layer.lora_b.T)
    torch.testing.assert_close(layer(x), expected)
    layer.merge()
    torch.testing.assert_close(layer(x), expected)


def test_an_adapted_model_begins_as_its_base_and_trains_the_adapters_alone():
    model = small_model()
    before = model(TOKENS)
    names = add_lora(model, LoRAConfig(rank=2))
    torch.testing.assert_close(model(TOKENS), before, rtol=0, atol=0)
    assert len(names) == 2 * 6
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.{part}" for name in names for part in ("lora_a", "lora_b")}
    model.loss(TOKENS, TOKENS).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("position", ["pre", "post"])
def test_fused_projections_with_adapters_are_the_separate_ones(position, monkeypatch):
    model = small_model(norm_position=position)
    add_lora(model, LoRAConfig(rank=2, targets=("q_proj", "v_proj")))
    stir(model)
    fused = model(TOKENS)
    monkeypatch.setattr(SelfAttention, "_project", lambda self, x: (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
    torch.testing.assert_close(fused, model(TOKENS))
    for layer in lora_layers(model).values():
        torch.nn.init.zeros_(layer.lora_b)
    assert not torch.allclose(fused, model(TOKENS))


def test_merge_and_unmerge():
    model = small_model(activation="swiglu", bias=True)
    add_lora(model, LoRAConfig(rank=4, alpha=8))
    stir(model)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    adapted = model(TOKENS)
    merge_lora(model)
    merge_lora(model)  # the second does nothing
    assert not torch.equal(
        weights["stack.blocks.0.attention.q_proj.weight"], model.stack.blocks[0].attention.q_proj.weight
    )
    torch.testing.assert_close(model(TOKENS), adapted, rtol=1e-4, atol=1e-5)
    unmerge_lora(model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, weights[name], rtol=0, atol=1e-6)
    torch.testing.assert_close(model(TOKENS), adapted, rtol=1e-4, atol=1e-5)


def test_baking_leaves_a_plain_model():
    model, plain = small_model(), small_model()
    add_lora(model, LoRAConfig(rank=4))
    stir(model)
    adapted = model(TOKENS)
    bake_lora(model)
    assert not lora_layers(model) and set(model.state_dict()) == set(plain.state_dict())
    torch.testing.assert_close(model(TOKENS), adapted, rtol=1e-4, atol=1e-5)


def test_bfloat16_activations_and_a_packed_frozen_weight():
    model = small_model()
    add_lora(model, LoRAConfig(rank=4))
    stir(model)
    exact = model(TOKENS)
    model.compute_dtype = torch.bfloat16
    keep_packed(model)
    without = small_model()(TOKENS)
    assert (without - exact).norm() > 0.3 * exact.norm()
    assert (model(TOKENS).float() - exact).norm() < 0.05 * exact.norm()
    merge_lora(model)  # the packed weight must follow
    assert (model(TOKENS).float() - exact).norm() < 0.05 * exact.norm()


def test_targets_choose_layers_and_a_wrong_one_is_refused():
    model = small_model()
    assert add_lora(model, LoRAConfig(rank=1, targets=("*.blocks.1.attention.q_proj",))) == [
        "stack.blocks.1.attention.q_proj"
    ]
    with pytest.raises(UserError, match="fits no layer.*q_proj"):
        add_lora(small_model(), LoRAConfig(rank=1, targets=("query",)))


@pytest.mark.parametrize("values", [{"rank": -1}, {"rank": 1, "dropout": 1.0}, {"rank": 1, "alpha": 0.0}])
def test_values_out_of_range_are_refused(values):
    with pytest.raises(UserError, match="lora"):
        LoRAConfig(**values)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizers_hold_the_adapters_and_a_model_without_trained_matrices(name):
    model = small_model()
    add_lora(model, LoRAConfig(rank=1))
    held = [p for o in build_optimizers(model, OptimizerConfig(name=name)) for g in o.param_groups for p in g["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    model.requires_grad_(False)
    model.stack.norm.requires_grad_(True)
    optimizers = build_optimizers(model, OptimizerConfig(name=name))
    model.loss(TOKENS, TOKENS).backward()
    before = model.stack.norm.weight.clone()
    for optimizer in optimizers:
        optimizer.step()
    assert not torch.equal(before, model.stack.norm.weight)
