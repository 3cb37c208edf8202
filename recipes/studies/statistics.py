"""Statistics of a study, as pure functions on arrays: scipy and statsmodels, with the choices that a study needs.

A seed is the unit of replication. The paired t test on common seeds is the main test; everything else stands beside it.
NaN means "not measured" and is left out; where a statistic has no value (n too small, no spread) the result is NaN,
never a zero-width interval or p = 0.
"""

import bisect
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy import special, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from timm_igkd.errors import InputError

CONFIDENCE = 0.95
FEWEST_FOR_BOOTSTRAP = 20  # below, BCa intervals are too short, and a Q-Q plot or a normality test says little
MOST_SEEDS = 100_000  # a study that would need more is out of reach
NAN = math.nan


class Summary(NamedTuple):
    """Values of one cell over its seeds: t interval of the mean, and BCa bootstrap interval from n = 20."""

    n: int
    mean: float
    sd: float
    low: float
    high: float
    bca_low: float = NAN
    bca_high: float = NAN


class Comparison(NamedTuple):
    """Cell a minus cell b on common seeds; `sd` is that of the differences, `effect` their Hedges-corrected d_z."""

    n: int
    difference: float = NAN
    sd: float = NAN
    low: float = NAN
    high: float = NAN
    p: float = NAN
    welch_low: float = NAN
    welch_high: float = NAN
    welch_p: float = NAN
    effect: float = NAN
    effect_low: float = NAN
    effect_high: float = NAN


class Equivalence(NamedTuple):
    """Two one-sided tests of a mean difference against a bound; `p` is the larger of the two."""

    bound: float
    p: float = NAN
    low: float = NAN
    high: float = NAN


class Normality(NamedTuple):
    """Normal Q-Q data with its least-squares line, and the Shapiro-Wilk test; reported, never used to choose a test."""

    theoretical: np.ndarray
    ordered: np.ndarray
    slope: float
    intercept: float
    p: float


class Interval(NamedTuple):
    """An estimate with the bounds of its 95 % interval."""

    estimate: float
    low: float = NAN
    high: float = NAN


def pair_by_seed(a: Mapping[int, float], b: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of the seeds for which both have a finite one, in the seeds' order, each float64 [n]."""
    seeds = sorted(a.keys() & b.keys())
    return complete_pairs(np.array([a[seed] for seed in seeds]), np.array([b[seed] for seed in seeds]))


def _finite(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, float)
    return values[np.isfinite(values)]


def _has_spread(values: np.ndarray) -> bool:
    """Say whether values differ by more than rounding; percentages that are equal can differ in the last bits."""
    return len(values) > 1 and bool(np.ptp(values) > 1e-9 * max(1.0, float(np.abs(values).max())))


def summarize(values: np.ndarray, bootstrap: bool = True) -> Summary:
    """Return n, mean, sd (n - 1) and intervals of the mean.

    Args:
        values: [n] float; NaN is left out.
        bootstrap: also the BCa interval, from n = 20.
    """
    values = _finite(values)
    n, mean = len(values), float(values.mean()) if len(values) else NAN
    if n < 2:
        return Summary(n, mean, NAN, NAN, NAN)
    if not _has_spread(values):
        return Summary(n, mean, 0.0, NAN, NAN)
    low, high = stats.t.interval(CONFIDENCE, n - 1, loc=mean, scale=stats.sem(values))
    bca = (NAN, NAN)
    if bootstrap and n >= FEWEST_FOR_BOOTSTRAP:
        found = stats.bootstrap(
            (values,), np.mean, confidence_level=CONFIDENCE, method="BCa", rng=np.random.default_rng(0)
        ).confidence_interval
        bca = float(found.low), float(found.high)
    return Summary(n, mean, float(values.std(ddof=1)), float(low), float(high), *bca)


def compare_paired(a: np.ndarray, b: np.ndarray) -> Comparison:
    """Compare two cells on common seeds: paired t (the main test), Welch, and the effect size.

    Args:
        a: [n] float, one value a seed.
        b: [n] float, the same seeds in the same order; a seed with NaN on either side is left out.
    """
    a, b = complete_pairs(a, b)
    differences = a - b
    n = len(differences)
    if n == 0:
        return Comparison(0)
    if n < 2 or not _has_spread(differences):
        return Comparison(n, float(differences.mean()), NAN if n < 2 else 0.0)
    paired = stats.ttest_rel(a, b)
    low, high = paired.confidence_interval(CONFIDENCE)
    welch_p, welch_low, welch_high = NAN, NAN, NAN
    if _has_spread(a) and _has_spread(b):
        welch = stats.ttest_ind(a, b, equal_var=False)
        welch_p, (welch_low, welch_high) = float(welch.pvalue), map(float, welch.confidence_interval(CONFIDENCE))
    return Comparison(
        n,
        float(differences.mean()),
        float(differences.std(ddof=1)),
        float(low),
        float(high),
        float(paired.pvalue),
        welch_low,
        welch_high,
        welch_p,
        *effect_size(differences),
    )


def complete_pairs(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of two [n] arrays that are finite on both sides.

    Raises:
        InputError: the arrays are no two equally long lists.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape or a.ndim != 1:
        raise InputError(f"pairs need two equally long lists of values, got shapes {a.shape} and {b.shape}")
    known = np.isfinite(a) & np.isfinite(b)
    return a[known], b[known]


def equivalence(differences: np.ndarray, bound: float, alpha: float) -> Equivalence:
    """Test whether the mean of paired differences lies within ±`bound` (TOST).

    Args:
        differences: [n] float, one a seed; NaN is left out.
        bound: smallest difference of interest, above 0, in the unit of the differences.
        alpha: of each one-sided test.

    Returns:
        p, and the 1 - 2 alpha interval of the mean, which lies within ±`bound` just where p < alpha; NaN for fewer than
        two values or values without spread.

    Source: Schuirmann, J. Pharmacokinet. Biopharm. 15 (1987).
    """
    if not bound > 0:
        raise InputError(f"the bound of equivalence must be above 0, got {bound:g}")
    values = _finite(differences)
    if not _has_spread(values):
        return Equivalence(bound)
    above = stats.ttest_1samp(values, -bound, alternative="greater").pvalue
    below = stats.ttest_1samp(values, bound, alternative="less").pvalue
    low, high = stats.t.interval(1 - 2 * alpha, len(values) - 1, loc=values.mean(), scale=stats.sem(values))
    return Equivalence(bound, float(max(above, below)), float(low), float(high))


def effect_size(differences: np.ndarray) -> Interval:
    """Return Hedges' corrected d_z of finite paired differences with its interval from the noncentral t distribution.

    The estimate is J * mean / sd, J the exact small-sample correction (gamma functions). The interval holds the
    population's mean / sd: the noncentrality parameters that put the observed t at the 97.5 % and 2.5 % points, over
    sqrt(n); being no estimates, its bounds take no correction.

    Source: Hedges, J. Educ. Stat. 6 (1981); Cumming and Finch, Educ. Psychol. Meas. 61 (2001).
    """
    n = len(differences)
    if n < 3 or not _has_spread(differences):  # with one degree of freedom there is no unbiased estimate
        return Interval(NAN)
    dof = n - 1
    ratio = differences.mean() / differences.std(ddof=1)
    correction = math.exp(special.gammaln(dof / 2) - special.gammaln((dof - 1) / 2)) / math.sqrt(dof / 2)
    t = ratio * math.sqrt(n)
    tail = (1 - CONFIDENCE) / 2
    low, high = (special.nctdtrinc(dof, level, t) / math.sqrt(n) for level in (1 - tail, tail))
    return Interval(float(correction * ratio), float(low), float(high))


def holm(p_values: np.ndarray) -> np.ndarray:
    """Return Holm-adjusted p values of one family; a NaN stays NaN but counts as a member of the family.

    Args:
        p_values: [m] float in [0, 1] or NaN.
    """
    p_values = np.asarray(p_values, float)
    if not len(p_values):
        return p_values
    known = np.isfinite(p_values)
    adjusted = multipletests(np.where(known, p_values, 1.0), method="holm")[1]
    return np.where(known, adjusted, NAN)


def normality(values: np.ndarray) -> Normality | None:
    """Return Q-Q data and Shapiro-Wilk of [n] values, or None under n = 20 or where the values are equal."""
    values = _finite(values)
    if len(values) < FEWEST_FOR_BOOTSTRAP or not _has_spread(values):
        return None
    (theoretical, ordered), (slope, intercept, _) = stats.probplot(values)
    return Normality(theoretical, ordered, float(slope), float(intercept), float(stats.shapiro(values).pvalue))


def paired_power(sd: float, n: int, difference: float, alpha: float) -> float:
    """Return the power of the two-sided paired t test to see a true `difference`, at the observed sd of differences."""
    if not sd > 0 or n < 2:
        return NAN
    found = TTestPower().power(difference / sd, n, alpha)
    if math.isnan(found):  # a large effect: scipy lacks the far tail, which adds nothing, and some near ones
        edge, shift = stats.t.isf(alpha / 2, n - 1), abs(difference) / sd * math.sqrt(n)
        found = 1 - stats.chi(n - 1, scale=1 / math.sqrt(n - 1)).expect(lambda s: stats.norm.cdf(edge * s - shift))
    return float(found)


def seeds_needed(sd: float, difference: float, alpha: float, power: float = 0.8) -> float:
    """Return the fewest seeds that give the paired t test `power` for a true `difference`; NaN without spread.

    Found by bisection over n of statsmodels' power, as its own `solve_power` does not converge for large effects.
    """
    if not sd > 0:
        return NAN
    sizes = range(2, MOST_SEEDS)
    found = bisect.bisect_left(sizes, power, key=lambda n: paired_power(sd, n, difference, alpha))
    return sizes[found] if found < len(sizes) else math.inf
