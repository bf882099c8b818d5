"""Held-out loss over a token data set: every token once, bits per byte by the bytes of the text."""

import functools
import math

import pytest
import torch
from tests.train.toy import toy_config, toy_model

from warploom.data.shards import TokenDataset
from warploom.train.batches import TokenData
from warploom.train.heldout import HeldoutLoss, heldout_loss


def evaluate(model, data, micro_batch_size):
    loss_sum = functools.partial(model.loss, reduction="sum")
    return heldout_loss(loss_sum, data.heldout_batches(micro_batch_size), torch.device("cpu"))


def test_the_whole_split_is_read_once_whatever_the_batch(tmp_path, tokens):
    dataset = TokenDataset(tokens)
    config = toy_config(tmp_path, vocab_size=dataset.tokenizer.vocab_size, eval_tokens=0)
    model = toy_model(config).eval()
    data = TokenData(dataset, config.train)
    results = [evaluate(model, data, size) for size in (1, 7, 64)]
    assert {result.num_targets for result in results} == {dataset.heldout.num_tokens}
    assert {result.num_bytes for result in results} == {dataset.heldout.num_bytes}
    assert [r.loss for r in results] == pytest.approx([results[0].loss] * 3, rel=1e-5)
    result = results[0]
    assert result.loss == pytest.approx(math.log(dataset.tokenizer.vocab_size), abs=0.2)
    assert result.bits_per_byte == pytest.approx(
        result.loss * dataset.heldout.num_tokens / dataset.heldout.num_bytes / math.log(2)
    )


def test_eval_tokens_bounds_what_is_read(tmp_path, tokens):
    dataset = TokenDataset(tokens)
    config = toy_config(tmp_path, vocab_size=dataset.tokenizer.vocab_size, eval_tokens=100)
    result = evaluate(toy_model(config).eval(), TokenData(dataset, config.train), 4)
    assert 96 < result.num_targets <= 112 < dataset.heldout.num_tokens


def test_stop_ends_it_without_a_result(tmp_path, tokens):
    dataset = TokenDataset(tokens)
    config = toy_config(tmp_path, vocab_size=dataset.tokenizer.vocab_size)
    model, data = toy_model(config).eval(), TokenData(dataset, config.train)
    answers = iter([False, False, True])
    loss_sum = functools.partial(model.loss, reduction="sum")
    assert heldout_loss(loss_sum, data.heldout_batches(1), torch.device("cpu"), stop=lambda: next(answers)) is None


def test_units():
    result = HeldoutLoss(loss=math.log(8), num_targets=100, num_bytes=400)
    assert result.perplexity == pytest.approx(8) and result.bits_per_byte == pytest.approx(3 / 4)
    assert math.isnan(HeldoutLoss(1.0, 10, None).bits_per_byte)
    assert HeldoutLoss(2000.0, 10, None).perplexity < math.inf
