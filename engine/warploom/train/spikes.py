"""Which loss or gradient norm is a spike: far above those of the steps before, by a rule that spikes do not move.

The rule is the modified z-score of Iglewicz and Hoaglin (1993), which has the median for the mean and the median
absolute deviation for the standard deviation: steps that were spikes themselves hardly change either.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from warploom.train.config import TrainConfig

# Makes the median absolute deviation of normally distributed values their standard deviation.
_NORMAL = 1.4826
# Of the median: the least that a standard deviation counts as, so that a loss that hardly moves has no spikes.
_LEAST_SPREAD = 0.01


class Spike(NamedTuple):
    name: str
    value: float
    median: float
    zscore: float

    def __str__(self) -> str:
        return f"its {self.name} {self.value:.4g} lies {self.zscore:.0f} standard deviations above {self.median:.4g}"


def robust_zscore(value: float, before: Sequence[float]) -> float:
    """Return how many robust standard deviations value lies above the median of those before it."""
    median = statistics.median(before)
    spread = _NORMAL * statistics.median(abs(other - median) for other in before)
    spread = max(spread, _LEAST_SPREAD * abs(median))
    return (value - median) / spread if spread else 0.0


class SpikeWatch:
    """Looks at each step's loss and gradient norm before its update. recent holds the last spike_window of each by
    name, and is changed in place; spikes that are skipped are not taken into it.

    found: the spike that the step last looked at was, None if it was none.
    """

    def __init__(self, config: TrainConfig, recent: dict[str, list[float]]) -> None:
        self._config, self._recent = config, recent
        self.found: Spike | None = None

    def refuses(self, loss: float, grad_norm: float) -> bool:
        """Whether a step, whose values are finite, is a spike that is to be skipped."""
        config = self._config
        if not config.spike_zscore:
            return False
        values = {"loss": loss, "gradient norm": grad_norm}
        self.found = next(filter(None, (self._spike(name, value) for name, value in values.items())), None)
        if self.found is not None and config.on_spike == "skip":
            return True
        for name, value in values.items():
            self._recent[name] = [*self._recent.get(name, ()), value][-config.spike_window :]
        return False

    def _spike(self, name: str, value: float) -> Spike | None:
        before = self._recent.get(name, ())
        if len(before) < self._config.spike_window:
            return None
        zscore = robust_zscore(value, before)
        return Spike(name, value, statistics.median(before), zscore) if zscore > self._config.spike_zscore else None
