"""Means, standard errors, paired differences and pass@k against their definitions."""

import itertools
import math
import random
import statistics

import pytest

from warploom.evaluation.figures import mean_figure, paired_difference, pass_at_k


def test_a_mean_has_the_standard_error_of_its_sample():
    scores = [1.0, 0.0, 1.0, 1.0, 0.5]
    figure = mean_figure(scores)
    assert figure.value == pytest.approx(statistics.mean(scores))
    assert figure.stderr == pytest.approx(statistics.stdev(scores) / math.sqrt(5))
    assert figure.num_items == 5 and figure.clustered_stderr is None
    assert math.isnan(mean_figure([1.0]).stderr)


def test_clusters_that_agree_within_widen_the_error():
    alike = mean_figure([1.0] * 10 + [0.0] * 10, ["a"] * 10 + ["b"] * 10)
    # Two independent observations, 1 and 0: the mean of each cluster is all there is to know.
    assert alike.clustered_stderr == pytest.approx(mean_figure([1.0, 0.0]).stderr)
    assert alike.clustered_stderr > 3 * alike.stderr
    chance = random.Random(0)
    scores = [float(chance.random() < 0.5) for _ in range(4000)]
    single = mean_figure(scores, [str(n) for n in range(4000)])
    assert single.clustered_stderr == pytest.approx(single.stderr, rel=1e-3)


def test_a_paired_difference_sees_what_two_errors_hide():
    first = {str(n): float(n % 2) for n in range(100)}
    second = first | {"0": 1.0, "2": 1.0, "4": 1.0, "6": 1.0, "1": 0.0}
    difference = paired_difference(first, second | {"other": 0.0})
    assert difference.value == pytest.approx(0.03) and difference.num_items == 100
    assert (difference.num_better, difference.num_worse) == (4, 1)
    assert difference.stderr < 0.5 * mean_figure(list(first.values())).stderr
    assert difference.z == pytest.approx(difference.value / difference.stderr)
    with pytest.raises(ValueError, match="items in common"):
        paired_difference({"a": 1.0}, {"b": 1.0})


@pytest.mark.parametrize(("n", "c", "k"), [(6, 2, 1), (6, 2, 3), (6, 0, 3), (6, 6, 6), (6, 5, 2), (7, 3, 7)])
def test_pass_at_k_is_the_share_of_samples_of_k_with_a_right_one(n, c, k):
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_needs_k_samples():
    with pytest.raises(ValueError, match="at least k = 5"):
        pass_at_k(4, 1, 5)
