import dataclasses

import pytest

from warploom.errors import UserError
from warploom.models import PRESETS, TransformerConfig, preset


def test_widths_that_follow():
    config = TransformerConfig(d_model=48, num_heads=6)
    assert (config.kv_heads, config.head_width, config.ff_width) == (6, 8, 192)
    config = dataclasses.replace(config, d_model=96, num_kv_heads=2)
    assert (config.kv_heads, config.head_width, config.ff_width) == (2, 16, 384)
    assert dataclasses.replace(config, head_dim=10, d_ff=7).head_width == 10


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"d_model": 64, "num_heads": 7}, r"num_heads 7 does not divide d_model 64: take 8 heads"),
        ({"num_heads": 6, "num_kv_heads": 4}, r"num_kv_heads 4 does not divide num_heads 6: take 3"),
        ({"position": "rotery"}, r"position cannot be 'rotery'; did you mean 'rotary'\?"),
        ({"parallel_norms": 3}, "parallel_norms cannot be 3"),
        ({"d_model": 15, "num_heads": 5}, "even head width, got 3"),
        ({"d_model": 15, "num_heads": 5, "position": "sinusoidal"}, "even d_model, got 15"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"num_kv_heads": 0}, "num_kv_heads must be at least 1, got 0"),
        ({"dropout": 1.0}, "dropout must be .* got 1.0"),
        ({"norm_eps": 0.0}, "norm_eps must be positive"),
        ({"init_std": -1.0}, "init_std must be positive"),
        ({"rotary_base": 1.0}, "rotary_base must be above 1"),
        ({"parallel_block": True, "norm_position": "post"}, "parallel_block needs norm_position 'pre'"),
        ({"parallel_block": True, "architecture": "encoder-decoder"}, "parallel_block is for"),
        ({"num_encoder_layers": 2}, "num_encoder_layers is for architecture 'encoder-decoder'"),
        ({"source_vocab_size": 9, "architecture": "encoder"}, "source_vocab_size is for"),
    ],
)
def test_what_does_not_fit_is_refused(fields, words):
    with pytest.raises(UserError, match=words):
        TransformerConfig(**fields)


def test_unknown_preset_names_the_nearest():
    assert preset("gpt2") is PRESETS["gpt2"]
    with pytest.raises(UserError, match="'gpt-2'; did you mean 'gpt2'"):
        preset("gpt-2")
