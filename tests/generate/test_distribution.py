"""The distribution that tokens are drawn from, against definitions written out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from warploom.errors import UserError
from warploom.generate.distribution import SamplingConfig, draw, penalise_repetition, probabilities

LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0], [0.0, 3.0, 3.0, -2.0, 1.0]])


def test_temperature_divides_the_logits():
    for temperature in (0.3, 1.0, 2.0):
        expected = torch.softmax(LOGITS / temperature, -1)
        torch.testing.assert_close(probabilities(LOGITS, SamplingConfig(temperature=temperature)), expected)


def test_top_k_keeps_the_k_likeliest():
    kept = probabilities(LOGITS, SamplingConfig(temperature=1.0, top_k=2)) > 0
    assert kept.tolist() == [[True, True, False, False, False], [False, True, True, False, False]]
    assert (probabilities(LOGITS, SamplingConfig(temperature=1.0, top_k=99)) > 0).all()


def test_min_p_is_relative_to_the_likeliest():
    probs = torch.softmax(LOGITS, -1)
    kept = probabilities(LOGITS, SamplingConfig(temperature=1.0, min_p=0.2)) > 0
    assert torch.equal(kept, probs >= 0.2 * probs.max(-1, keepdim=True).values)


@settings(deadline=None, max_examples=60)
@given(st.floats(0.01, 1.0), st.integers(0, 2**31))
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p, seed):
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(seed))
    probs = torch.softmax(logits, -1)[0]
    kept = probabilities(logits, SamplingConfig(temperature=1.0, top_p=top_p))[0] > 0
    mass = 0.0
    for token in probs.argsort(descending=True):
        reached = mass >= top_p
        # At the border itself rounding decides; everywhere else the definition does.
        assert abs(mass - top_p) < 1e-5 or bool(kept[token]) != reached
        mass += float(probs[token])


def test_filtered_rows_sum_to_one():
    config = SamplingConfig(temperature=0.7, top_k=4, top_p=0.8, min_p=0.05)
    torch.testing.assert_close(probabilities(LOGITS, config).sum(-1), torch.ones(2))


def test_repetition_penalty_makes_seen_tokens_less_likely():
    seen = torch.tensor([[True, False, False, True, False], [False] * 5])
    out = penalise_repetition(LOGITS, seen, 2.0)
    assert out[0].tolist() == [1.0, 1.0, 0.5, -2.0, 0.0]
    assert torch.equal(out[1], LOGITS[1])


def test_draws_follow_the_distribution_and_skip_what_is_impossible():
    probs = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    generator = torch.Generator().manual_seed(1)
    drawn = draw(probs.expand(20_000, -1), [generator] * 20_000)
    frequency = torch.bincount(drawn, minlength=6) / 20_000
    assert frequency[probs == 0].sum() == 0
    # Five standard deviations of a binomial share.
    assert (frequency - probs).abs().max() < 5 * math.sqrt(0.25 / 20_000)


def test_a_row_draws_the_same_whatever_is_beside_it():
    probs = torch.softmax(torch.randn(3, 50, generator=torch.Generator().manual_seed(0)), -1)
    alone = draw(probs[1:2], [torch.Generator().manual_seed(7)])
    together = draw(probs, [torch.Generator().manual_seed(seed) for seed in (5, 7, 9)])
    assert together[1] == alone[0]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"temperature": 2.5}, "temperature is 2.5; it must be between 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": -1.0}, "min_p is -1.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"stop": ("",)}, "stop is"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"num_samples": 0}, "num_samples is 0"),
    ],
)
def test_values_out_of_range_are_refused(values, sentence):
    with pytest.raises(UserError) as error:
        SamplingConfig(**values)
    assert sentence in str(error.value)
