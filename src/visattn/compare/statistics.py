"""Paired Student t intervals: what a handful of seeds can and cannot tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from visattn.errors import require

__all__ = ["LEVEL", "Interval", "Outcome", "mean_interval", "paired_differences"]

LEVEL = 0.95  # two-sided level of every interval in the report

# Scores are ratios of counts, so differences closer than this differ by float rounding alone.
_ROUNDING = 1e-9

Outcome = Literal["better", "worse", "unclear", "identical", "one seed", "no pair"]


@dataclass(frozen=True)
class Interval:
    """The mean of a few values and, where the values allow one, its confidence interval.

    `low` and `high` are None for a single value, and for several values without any spread: a Student t interval
    would then have no width, which is no evidence of certainty.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def outcome(self) -> Outcome:
        """What the interval says about the sign of the mean."""
        if self.count == 0:
            return "no pair"
        if self.count == 1:
            return "one seed"
        if self.low is None or self.high is None:
            return "identical"
        if self.low > 0:
            return "better"
        if self.high < 0:
            return "worse"
        return "unclear"


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and Student t interval of independent values; values that are not finite are left out.

    Args:
        values: One value per seed.

    Returns:
        The interval; `count` says how many finite values it rests on, and with none the mean is NaN.
    """
    finite = [value for value in values if math.isfinite(value)]
    count = len(finite)
    if count == 0:
        return Interval(math.nan, None, None, 0)
    mean = math.fsum(finite) / count
    if count == 1 or max(finite) - min(finite) <= _ROUNDING:
        return Interval(mean, None, None, count)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in finite) / (count - 1))
    special = require("scipy.special", extra="compare", purpose="the report")
    half = float(special.stdtrit(count - 1, 0.5 + LEVEL / 2)) * deviation / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def paired_differences(first: Mapping[int, float], second: Mapping[int, float]) -> list[float]:
    """Differences `first - second` of the seeds that have a finite value in both, in the order of the seeds.

    Args:
        first: Value by seed.
        second: Value by seed.
    """
    shared = sorted(first.keys() & second.keys())
    return [first[seed] - second[seed] for seed in shared if math.isfinite(first[seed] - second[seed])]
