"""What per-item scores amount to: means with their standard errors, differences of two models on the same items, and
pass@k."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Figure:
    """A mean over items."""

    value: float
    stderr: float
    """Sample standard deviation (n - 1) over the square root of n; nan for one item."""
    num_items: int
    clustered_stderr: float | None = None
    """The same where items of a group (a subject) may be alike in what makes them hard; None without groups."""


def mean_figure(scores: Sequence[float], groups: Sequence[str] = ()) -> Figure:
    """Average scores; groups: that of each item, for clustered_stderr."""
    values = np.asarray(scores, dtype=np.float64)
    n = len(values)
    stderr = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    return Figure(float(values.mean()), stderr, n, _clustered_stderr(values, groups) if len(set(groups)) > 1 else None)


def _clustered_stderr(values: np.ndarray, groups: Sequence[str]) -> float:
    """The standard error of a mean whose deviations are independent between groups only (Liang and Zeger, 1986)."""
    names, numbers = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(numbers, weights=values - values.mean())
    return float(math.sqrt(len(names) / (len(names) - 1) * (sums**2).sum()) / len(values))


def figures_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """Average every score that the records have; the items may have different ones (pass@k, where k samples are)."""
    scores: dict[str, list[float]] = defaultdict(list)
    groups: dict[str, list[str]] = defaultdict(list)
    for record in records:
        for name, score in record["scores"].items():
            scores[name].append(score)
            groups[name].append(record["group"])
    return {name: mean_figure(scores[name], groups[name]) for name in scores}


@dataclass(frozen=True)
class Difference:
    """How much better one model is than another, item by item."""

    value: float
    """Mean of the differences, the second's score less the first's."""
    stderr: float
    num_items: int
    num_better: int
    num_worse: int

    @property
    def z(self) -> float:
        """The difference in standard errors; beyond 1.96 either way in one of 20 comparisons of equal models."""
        if self.stderr > 0:
            return self.value / self.stderr
        return math.nan if self.value else 0.0


def paired_difference(first: Mapping[str, float], second: Mapping[str, float]) -> Difference:
    """Compare scores by item id, over the items that both have. Raises ValueError if there is none."""
    common = sorted(first.keys() & second.keys())
    if not common:
        raise ValueError("first and second must have items in common, got none")
    differences = np.array([second[item] - first[item] for item in common], dtype=np.float64)
    mean = mean_figure(differences.tolist())
    return Difference(mean.value, mean.stderr, len(common), int((differences > 0).sum()), int((differences < 0).sum()))


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Estimate without bias the chance that one of k samples is right: 1 - C(n - c, k) / C(n, k) (Chen et al., 2021).

    Raises ValueError for fewer than k samples.
    """
    if num_samples < k:
        raise ValueError(f"num_samples must be at least k = {k}, got {num_samples}")
    return 1.0 - math.prod(1.0 - k / n for n in range(num_samples - num_right + 1, num_samples + 1))
