"""The run configuration: exact JSON round trip, and one clear sentence for whatever does not fit."""

import json
from pathlib import Path

import pytest

from warploom.errors import UserError
from warploom.train.config import OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig, TransformerConfig


def test_the_round_trip_through_json_is_exact():
    config = RunConfig(
        model=TransformerConfig(vocab_size=777, d_model=48, num_heads=3, dropout=0.1, position="alibi"),
        train=TrainConfig(out_dir=Path("somewhere"), epochs=1.5, patience=3, sample_prompts=("a", "b c")),
        optimizer=OptimizerConfig(name="muon", lr=1 / 3, betas=(0.8, 0.99)),
        schedule=ScheduleConfig(kind="wsd", warmup_steps=7),
    )
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_absent_settings_take_their_defaults():
    assert RunConfig.from_dict({"train": {"steps": 5}}) == RunConfig(train=TrainConfig(steps=5))
    assert RunConfig.from_dict({"optimizer": {"lr": 1}}).optimizer.lr == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trian": {}}, r"unknown setting trian; did you mean 'train'\?"),
        ({"train": {"golbal_batch_size": 4}}, r"unknown setting train.golbal_batch_size; did you mean 'global_batch_s"),
        ({"model": {"vocab_sise": 4}}, r"unknown setting model.vocab_sise; did you mean 'vocab_size'"),
        ({"train": {"steps": 2.5}}, "train.steps is 2.5; give a whole number"),
        ({"train": {"steps": True}}, "train.steps is True; give a whole number"),
        ({"train": {"epochs": "2"}}, "train.epochs is '2'; give a number"),
        ({"train": {"compile": 1}}, "train.compile is 1; give true or false"),
        ({"train": {"dtype": "fp23"}}, r"train.dtype is 'fp23'; did you mean 'fp32'"),
        ({"train": {"out_dir": 3}}, "train.out_dir is 3; give a path"),
        ({"train": {"sample_prompts": "a"}}, "train.sample_prompts is 'a'"),
        ({"optimizer": {"betas": [0.9]}}, r"optimizer.betas is \[0.9\]"),
        ({"train": 3}, "train is 3; give a table"),
    ],
)
def test_what_does_not_fit_is_named(values, message):
    with pytest.raises(UserError, match=message):
        RunConfig.from_dict(values)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 10, "epochs": 1.0}, "train.steps is 10 and train.epochs is 1.0; give one"),
        ({"steps": 0}, "train.steps is 0"),
        ({"epochs": -1.0}, "train.epochs is -1.0"),
        ({"global_batch_size": 10, "micro_batch_size": 4}, "train.global_batch_size is 10, not a multiple"),
        ({"keep_last": 0}, "train.keep_last is 0"),
        ({"grad_clip": float("nan")}, "train.grad_clip is nan"),
        ({"seq_len": 0}, "train.seq_len is 0"),
    ],
)
def test_values_out_of_range_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**settings)


def test_a_sequence_longer_than_the_model_takes_is_refused():
    with pytest.raises(UserError, match="train.seq_len is 300, more than model.max_seq_len 200"):
        RunConfig(model=TransformerConfig(max_seq_len=200), train=TrainConfig(seq_len=300))
