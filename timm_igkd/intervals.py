"""Means with their 95 % intervals, without scipy, and numbers rounded for a reader."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Z_TWO_SIDED = statistics.NormalDist().inv_cdf(0.975)
"""Standard deviations of a normal distribution within which 95 % lie, 1.96."""
Z_ONE_SIDED = statistics.NormalDist().inv_cdf(0.95)
"""Standard deviations under which 95 % lie, 1.645."""


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % t interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean of at least two independent values and its 95 % t interval."""
    mean, half = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    half *= t_quantile(len(values) - 1)
    return Interval(mean, mean - half, mean + half)


def wilson_interval(found: int, n: int, z: float = Z_TWO_SIDED) -> tuple[float, float]:
    """Return Wilson's score interval of `found` out of `n`, as shares in [0, 1]; 95 % by default."""
    share, spread = found / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def t_quantile(degrees: int) -> float:
    """Return the 97.5 % quantile of the t distribution, to float precision, without scipy.

    Args:
        degrees: of freedom, at least 1.
    """
    low, high = 0.0, math.pi / 2
    while low < (angle := (low + high) / 2) < high:
        low, high = (angle, high) if _t_share(angle, degrees) < 0.95 else (low, angle)
    return math.sqrt(degrees) * math.tan(angle)


def _t_share(angle: float, degrees: int) -> float:
    """Return P(|T| <= sqrt(degrees) * tan(angle)): a finite sum, Abramowitz and Stegun 26.7.3 and 26.7.4."""
    odd = degrees % 2
    term, total = (math.cos(angle), 0.0) if odd else (1.0, 0.0)
    for power in range(2 + odd, degrees + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power - 1) / power
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def three_digits(value: float) -> str:
    """Return a number to three digits, from 1,000 on a whole one."""
    return f"{value:.3g}" if abs(float(f"{value:.3g}")) < 1000 else f"{round(value):,}"
