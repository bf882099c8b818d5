"""Exact parameter counts, on the meta device, against the published ones."""

import dataclasses

import pytest
import torch

from warploom.models import PRESETS, Transformer, TransformerConfig, preset
from warploom.nn.lora import LoRAConfig, add_lora

# Counts of the released models as their loaders and model pages give them (a tied matrix once); for falcon-180b the
# values stored in its checkpoint.
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama2-70b": 68_976_648_192,
    "falcon-7b": 6_921_720_704,
    "falcon-180b": 179_522_565_120,
}
# Published in words ("175B", "65 x 10^6") or ours: the exact number is reckoned by hand below.
RECKONED = {
    "gpt3-175b": 96 * (12 * 12288**2 + 13 * 12288) + (50257 + 2048) * 12288 + 2 * 12288,
    "transformer-base": 37000 * 512
    + 6 * (4 * 512 * 513 + 2 * 512 * 2048 + 2048 + 512 + 4 * 512)
    + 6 * (8 * 512 * 513 + 2 * 512 * 2048 + 2048 + 512 + 6 * 512),
    "nano": 4096 * 128 + 4 * (12 * 128**2 + 4 * 128) + 2 * 128,
    "tiny": 4096 * 256 + 4 * (12 * 256**2 + 4 * 256) + 2 * 256,
    "small": 8192 * 384 + 6 * (12 * 384**2 + 4 * 384) + 2 * 384,
    "base": 32768 * 768 + 12 * (12 * 768**2 + 4 * 768) + 2 * 768,
}


def on_meta(config: TransformerConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count(name):
    model = on_meta(preset(name))
    assert model.num_parameters() == {**PUBLISHED, **RECKONED}[name]
    assert all(p.is_meta for p in model.parameters())  # 718 GB of falcon-180b would not fit
    assert not list(model.buffers())  # and nothing is missing once the parameters are there


def test_gpt3_is_the_papers_175_billion():
    assert round(RECKONED["gpt3-175b"] / 1e9) == 175


def test_transformer_base_is_the_papers_up_to_its_vocabulary():
    """63,082,496 against "65 x 10^6". The difference is in the embedding alone: the paper's variants with 2, 4 and 8
    layers (36, 50 and 80 million) put one pair of layers at 7.3 million, and the rest at 21 million, which is 41,000
    rows of 512 rather than the "about 37000" of its text."""
    base = preset("transformer-base")
    assert on_meta(base).num_parameters() == 63_082_496
    counts = {
        L: on_meta(dataclasses.replace(base, num_layers=L, vocab_size=41000)).num_parameters() for L in (2, 4, 6, 8)
    }
    paper = {2: 36e6, 4: 50e6, 6: 65e6, 8: 80e6}
    assert {L: round(count / 1e6) for L, count in counts.items()} == {
        L: round(count / 1e6) for L, count in paper.items()
    }


def test_falcon_checkpoints_store_the_output_matrix():
    """transformers counts 7B with the output matrix shared; its checkpoint stores both, as that of 180B does."""
    falcon = preset("falcon-7b")
    stored = on_meta(dataclasses.replace(falcon, tie_embeddings=False)).num_parameters()
    assert stored == PUBLISHED["falcon-7b"] + falcon.vocab_size * falcon.d_model == 7_217_189_760


def test_flops_per_token():
    """6 per weight in a matrix product; attention 12 H D per key and layer, half the window seen if causal."""
    small = preset("small")
    weights = 6 * 12 * 384**2 + 8192 * 384
    assert on_meta(small).flops_per_token(256) == 6 * weights + 6 * 12 * 384 * 128
    encoder = dataclasses.replace(small, architecture="encoder")
    assert on_meta(encoder).flops_per_token(256) == 6 * weights + 6 * 12 * 384 * 256
    untied = dataclasses.replace(small, tie_embeddings=False)
    assert on_meta(untied).flops_per_token(256) == on_meta(small).flops_per_token(256)
    # Encoder-decoder: an encoder with the same blocks beside a decoder with 4 C^2 more per block, for cross-attention.
    both = dataclasses.replace(small, architecture="encoder-decoder")
    weights = 6 * (12 + 16) * 384**2 + 8192 * 384
    assert on_meta(both).flops_per_token(256) == 6 * weights + 6 * 12 * 384 * (256 + 256 + 128)


def test_frozen_weights_cost_less():
    """4 per frozen weight that gradients pass, 2 per weight below the first trained block."""
    config = dataclasses.replace(preset("small"), tie_embeddings=False)
    block, attention, head = 12 * 384**2, 4 * 384 * 128, 8192 * 384
    model = on_meta(config)
    model.requires_grad_(False)
    assert model.flops_per_token(256) == 6 * (2 * block + attention) + 2 * head  # nothing is trained: forward alone
    model.stack.blocks[4].requires_grad_(True)
    expected = 4 * (2 * block + attention) + (6 * block + 3 * attention) + (4 * block + 3 * attention) + 4 * head
    assert model.flops_per_token(256) == expected
    model.lm_head.requires_grad_(True)
    assert model.flops_per_token(256) == expected + 2 * head
    with torch.device("meta"):
        add_lora(model, LoRAConfig(rank=8))
    adapters = 8 * (4 * 2 * 384 + 2 * (384 + 4 * 384))
    assert model.flops_per_token(256) == 6 * (4 * block + 6 * adapters + 3 * attention) + 4 * head
