"""Trained models of other people, against the numbers that came with them (real_models.py)."""

import pytest
from tests.interchange.real_models import MODELS, mathformer_sums


@pytest.mark.parametrize("agreements", MODELS, ids=lambda function: function.__name__)
def test_a_real_model_gives_the_numbers_that_came_with_it(agreements, shared_data, tmp_path):
    found = list(agreements(shared_data, tmp_path))
    assert found and [each for each in found if not each.holds] == []


def test_all_sums_are_asked_for():
    assert len(list(mathformer_sums())) == 345
