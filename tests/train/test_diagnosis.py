"""What the curve of evaluations is taken to say."""

import pytest

from warploom.train.diagnosis import diagnose
from warploom.train.monitor import EvalRecord


def curve(heldout, train):
    return [
        EvalRecord(step=100 * (i + 1), heldout_loss=h, bits_per_byte=h, train_loss=t)
        for i, (h, t) in enumerate(zip(heldout, train, strict=True))
    ]


def test_a_heldout_loss_that_rises_again_is_overfitting():
    (warning,) = diagnose(curve([4.0, 3.0, 2.5, 2.7, 3.1], [4.1, 3.0, 2.2, 1.5, 0.9]))
    assert warning.startswith("Overfitting: the held-out loss was lowest at step 300 (2.500) and has risen to 3.100")


def test_a_gap_that_opened_is_the_beginning_of_overfitting():
    (warning,) = diagnose(curve([4.0, 3.0, 2.6, 2.51, 2.5, 2.5], [4.0, 2.9, 2.5, 2.3, 2.2, 2.1]))
    assert warning.startswith("Overfitting begins")


def test_a_gap_that_was_there_from_the_first_is_the_text_not_the_model():
    assert diagnose(curve([4.0, 3.0, 2.6, 2.51, 2.5, 2.5], [3.6, 2.6, 2.2, 2.11, 2.1, 2.1])) == []


def test_a_loss_still_falling_at_the_end_is_underfitting():
    (warning,) = diagnose(curve([5.0, 4.5, 4.1, 3.8, 3.5], [5.2, 4.6, 4.2, 3.9, 3.6]))
    assert warning.startswith("Underfitting: the held-out loss still fell from 3.800 to 3.500")


@pytest.mark.parametrize(
    ("heldout", "train"),
    [
        ([4.0, 3.0, 2.6, 2.52, 2.5, 2.5], [4.4, 3.2, 2.6, 2.5, 2.48, 2.47]),
        ([4.0, 3.0, 2.6, 2.5, 2.51, 2.505], [4.4, 3.2, 2.6, 2.5, 2.48, 2.47]),
        ([5.0, 3.0], [5.0, 1.0]),
        ([], []),
    ],
)
def test_a_good_or_a_short_curve_says_nothing(heldout, train):
    assert diagnose(curve(heldout, train)) == []
