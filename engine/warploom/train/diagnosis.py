"""Reads a curve of evaluations as an experienced eye would: does the model overfit, or would it go on learning?"""

from __future__ import annotations

from collections.abc import Sequence

from warploom.train.monitor import EvalRecord

_RISE = 0.01  # of the lowest held-out loss: more than the noise of an evaluation that always reads the same tokens
_GAP = 0.10  # growth of the gap between the two losses, of the training loss
_FALL = 0.02  # of the held-out loss, over the last fifth of the run


def diagnose(curve: Sequence[EvalRecord]) -> list[str]:
    """Return a plain sentence for overfitting and one for underfitting, where the curve shows them.

    Fewer than three evaluations show nothing.
    """
    if len(curve) < 3:
        return []
    first, last = curve[0], curve[-1]
    best = min(curve, key=lambda record: record.heldout_loss)
    if last.heldout_loss > (1 + _RISE) * best.heldout_loss:
        return [
            f"Overfitting: the held-out loss was lowest at step {best.step:,} ({best.heldout_loss:.3f}) and has risen "
            f"to {last.heldout_loss:.3f}; use the best checkpoint, or more data, a smaller model, dropout or patience."
        ]
    warnings = []
    # Early on the training loss, a mean since the evaluation before, lags behind: a negative gap is no baseline.
    gap_at_first = max(0.0, first.heldout_loss - first.train_loss)
    if last.heldout_loss - last.train_loss - gap_at_first > _GAP * last.train_loss:
        warnings.append(
            f"Overfitting begins: the held-out loss ({last.heldout_loss:.3f}) has fallen behind the training loss "
            f"({last.train_loss:.3f}); more data or dropout will help more than more steps."
        )
    before = [record for record in curve if record.step <= 0.8 * last.step]
    if before and before[-1].heldout_loss - last.heldout_loss > _FALL * last.heldout_loss:
        warnings.append(
            f"Underfitting: the held-out loss still fell from {before[-1].heldout_loss:.3f} to {last.heldout_loss:.3f} "
            "over the last fifth of the run; a longer run, or a larger model, will be better."
        )
    return warnings
