"""Gradient checkpointing: the same bits whatever a block keeps, and each operator runs as often as it should."""

import contextlib
import gc
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import warploom
from warploom.models import Transformer, TransformerConfig
from warploom.models.recompute import NOTHING, PRODUCTS, keep, recomputable_blocks
from warploom.train.estimate import Ledger

SMALL = {"vocab_size": 17, "max_seq_len": 16, "d_model": 24, "num_layers": 3, "num_heads": 4, "dropout": 0.2}
KEPT = {
    "nothing": NOTHING,
    "products": PRODUCTS,
    "attention": frozenset({"warploom::attention_fwd"}),
    "second_linear": frozenset({"warploom::linear_fwd#1"}),
}


class Calls(TorchDispatchMode):
    """Counts what operators run."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.name()] += 1
        return func(*args, **(kwargs or {}))


def build(**fields):
    torch.manual_seed(0)
    return Transformer(TransformerConfig(**SMALL, **fields))


def gradients(model):
    torch.manual_seed(5)
    x = torch.randint(17, (3, 10))
    source = {"source": x} if model.config.architecture == "encoder-decoder" else {}
    model.zero_grad()
    with Calls() as calls:
        loss = model.loss(x[:, :-1], x[:, 1:], **source)
        loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters()), torch.get_rng_state()], calls.count


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize(
    "fields",
    [
        {"architecture": "encoder-decoder", "position": "t5"},
        {"activation": "swiglu", "norm": "rms_norm", "num_kv_heads": 1},
        {"activation": "gelu_tanh", "norm_position": "post", "bias": True},
        {"activation": "gelu", "parallel_block": True, "parallel_norms": 2},
    ],
    ids=lambda fields: fields.get("activation", "encoder-decoder"),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_and_random_numbers_are_the_same_bits(fields, kept, dtype):
    model = build(**fields)
    model.compute_dtype = dtype
    plain, plain_calls = gradients(model)
    keep(model, KEPT[kept])
    again, again_calls = gradients(model)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert again_calls["aten::bernoulli_.float"] > plain_calls["aten::bernoulli_.float"]  # it did run again


@pytest.mark.parametrize("backend", [None, "reference"])
def test_products_are_kept_and_norms_run_again(backend):
    model = build()
    with warploom.backend(backend) if backend else contextlib.nullcontext():
        _, plain = gradients(model)
        keep(model, PRODUCTS)
        _, products = gradients(model)
        keep(model, NOTHING)
        _, nothing = gradients(model)
    for name in PRODUCTS:
        assert products[name] == plain[name]
    # Once more in each of 3 blocks, whose every operator up to the last product is needed.
    for name, per_block in (("linear", 3), ("linear_qkv", 1), ("attention", 1), ("layer_norm", 2)):
        assert nothing[f"warploom::{name}_fwd"] == plain[f"warploom::{name}_fwd"] + 3 * per_block
    assert products["warploom::layer_norm_fwd"] == plain["warploom::layer_norm_fwd"] + 3 * 2


def test_one_of_several_calls_can_be_kept():
    model = build()
    _, plain = gradients(model)
    keep(model, frozenset({"warploom::linear_fwd#1"}))
    _, one = gradients(model)
    assert one["warploom::linear_fwd"] == plain["warploom::linear_fwd"] + 3 * 2


def test_every_second_block():
    model = build(architecture="encoder-decoder")
    keep(model, NOTHING, every=2)
    assert [block.kept for block in recomputable_blocks(model)] == [NOTHING, None] * 3
    keep(model, None)
    assert not any(block.kept is not None for block in recomputable_blocks(model))


def test_nothing_outlives_the_backward_pass():
    """What is kept must not point back at the graph that keeps it: only the cycle collector would free it."""
    model = build()
    left = []
    gc.collect()
    gc.disable()
    try:
        for kept in (None, PRODUCTS):
            keep(model, kept)
            model.zero_grad()
            with Ledger(list(model.parameters())) as ledger:
                gradients(model)
            left.append(ledger.live_bytes)
    finally:
        gc.enable()
    assert left[0] == left[1]


def test_a_kept_output_changed_in_place_is_an_error():
    model = build()
    keep(model, PRODUCTS)
    x = torch.randint(17, (3, 10))
    model.stack.blocks[1].feed_forward.down_proj.register_forward_hook(lambda module, args, y: y.mul_(2))
    loss = model.loss(x, x)
    with pytest.raises(RuntimeError, match=r"kept output of warploom::linear_fwd#2 was changed in place"):
        loss.backward()
