"""The study's statistics against scipy, statsmodels, closed forms and published numbers."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestIndPower, TTestPower
from statsmodels.stats.weightstats import DescrStatsW, ttost_paired

from studies.contrast import ALPHA
from studies.resampling import compare_subsets, summarize_subsets, two_level_bootstrap
from studies.results import DIFFERENCE
from studies.statistics import (
    compare_paired,
    effect_size,
    equivalence,
    holm,
    normality,
    pair_by_seed,
    paired_power,
    seeds_needed,
    summarize,
)
from timm_igkd.errors import InputError

SEEN = (DIFFERENCE, ALPHA)
# Student's sleep data (Biometrika 1908): additional hours of sleep of ten patients under two drugs.
DRUG_1 = np.array([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0])
DRUG_2 = np.array([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])


@pytest.fixture
def generator():
    return np.random.default_rng(7)


def test_summary_has_the_t_interval_of_statsmodels():
    summary = summarize(DRUG_1)
    assert (summary.n, summary.mean) == (10, pytest.approx(0.75))
    assert summary.sd == pytest.approx(1.789010, abs=1e-6)
    assert (summary.low, summary.high) == pytest.approx(DescrStatsW(DRUG_1).tconfint_mean())


def test_bootstrap_interval_starts_at_twenty_values(generator):
    values = generator.exponential(size=20)
    assert math.isnan(summarize(values[:19]).bca_low)
    expected = stats.bootstrap((values,), np.mean, method="BCa", rng=np.random.default_rng(0)).confidence_interval
    summary = summarize(values)
    assert (summary.bca_low, summary.bca_high) == (expected.low, expected.high)
    assert summary.bca_low < summary.mean < summary.bca_high


@pytest.mark.parametrize("bound", [0.5, 2.0, 3.0])
def test_equivalence_is_statsmodels_paired_tost(bound):
    found = equivalence(DRUG_2 - DRUG_1, bound, ALPHA)
    assert found.p == pytest.approx(ttost_paired(DRUG_2, DRUG_1, -bound, bound)[0])
    assert (found.low, found.high) == pytest.approx(DescrStatsW(DRUG_2 - DRUG_1).tconfint_mean(alpha=0.1))
    assert (found.p < 0.05) == (-bound < found.low and found.high < bound)


@pytest.mark.parametrize("values", [[], [0.1], [0.1, 0.1, 0.1], [np.nan, 0.2]])
def test_equivalence_needs_two_values_with_spread(values):
    found = equivalence(np.array(values), 0.2, ALPHA)
    assert math.isnan(found.p)
    assert math.isnan(found.low)


@pytest.mark.parametrize("bound", [0.0, -0.2, math.nan])
def test_bound_of_equivalence_is_above_zero(bound):
    with pytest.raises(InputError, match="must be above 0"):
        equivalence(DRUG_1, bound, ALPHA)


def test_not_measured_values_are_left_out():
    assert summarize(np.array([1.0, np.nan, 3.0])) == summarize(np.array([1.0, 3.0]))
    with_gap = compare_paired(np.append(DRUG_1, np.nan), np.append(DRUG_2, 1.0))
    assert with_gap == compare_paired(DRUG_1, DRUG_2)


@pytest.mark.parametrize("values", [[], [np.nan]])
def test_no_value_has_no_mean(values):
    summary = summarize(np.array(values))
    assert summary.n == 0
    assert math.isnan(summary.mean)


@pytest.mark.parametrize("values", [[91.5], [91.1 + 0.2, 91.3]])
def test_without_spread_there_is_no_interval(values):
    """0.1 + 0.2 and 0.3 differ in the last bit: that is no spread."""
    summary = summarize(np.array(values))
    assert summary.mean == pytest.approx(values[0])
    assert np.isnan([summary.low, summary.high]).all()


def test_paired_test_of_the_sleep_data_gives_the_published_p():
    """R's `t.test(extra ~ group, paired = TRUE)`: t = -4.0621, p = 0.002833, interval -2.4598858 to -0.7001142."""
    found = compare_paired(DRUG_1, DRUG_2)
    assert (found.n, found.difference) == (10, pytest.approx(-1.58))
    assert found.p == pytest.approx(0.002833, abs=1e-6)
    assert (found.low, found.high) == pytest.approx((-2.4598858, -0.7001142), abs=1e-6)


def test_welch_of_the_sleep_data_gives_the_published_p():
    """R's `t.test(extra ~ group)`: p = 0.07939, interval -3.3654832 to 0.2054832."""
    found = compare_paired(DRUG_1, DRUG_2)
    assert found.welch_p == pytest.approx(0.07939, abs=1e-5)
    assert (found.welch_low, found.welch_high) == pytest.approx((-3.3654832, 0.2054832), abs=1e-6)


def test_welch_of_the_papers_table_is_its_p_within_rounding():
    """PAPER.md: KD&IG 92.02 (sd .340) against KD 91.62 (.435), ten runs each, p = .037; the means are rounded."""
    test = {
        gap: stats.ttest_ind_from_stats(gap, 0.340, 10, 0, 0.435, 10, equal_var=False).pvalue
        for gap in (0.39, 0.40, 0.41)
    }
    assert test[0.40] == pytest.approx(0.035, abs=1e-4)
    assert test[0.41] < 0.037 < test[0.39]
    values = stats.zscore(DRUG_1, ddof=1)
    found = compare_paired(92.02 + 0.340 * values, 91.62 + 0.435 * stats.zscore(DRUG_2, ddof=1))
    assert found.welch_p == pytest.approx(test[0.40])


def test_pairs_without_spread_have_no_p():
    found = compare_paired(np.array([91.0, 92.0, 93.0]), np.array([90.9, 91.9, 92.9]))
    assert found.difference == pytest.approx(0.1)
    power, needed = paired_power(found.sd, 3, *SEEN), seeds_needed(found.sd, *SEEN)
    assert np.isnan([found.p, found.low, found.effect, power, needed]).all()


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_pairs_have_no_p(n):
    found = compare_paired(DRUG_1[:n], DRUG_2[:n])
    assert found.n == n
    assert math.isnan(found.p)


def test_unequal_lengths_are_refused():
    with pytest.raises(InputError, match=r"equally long lists of values, got shapes \(10,\) and \(9,\)"):
        compare_paired(DRUG_1, DRUG_2[:9])


def test_only_common_seeds_are_paired():
    a, b = pair_by_seed({3: 1.0, 0: 2.0, 1: 9.0, 5: np.nan}, {0: 4.0, 3: 3.0, 5: 1.0, 7: 8.0})
    assert a.tolist() == [2.0, 1.0]
    assert b.tolist() == [4.0, 3.0]


def test_effect_size_is_corrected_for_its_bias(generator):
    """The mean of many estimates is the true d_z, where the uncorrected one is 6 % too large at n = 14."""
    samples = generator.normal(0.8, 1, size=(4000, 14))
    raw = samples.mean(1) / samples.std(1, ddof=1)
    corrected = np.array([effect_size(sample).estimate for sample in samples[:200]])
    ratio = corrected / raw[:200]
    assert ratio == pytest.approx(ratio[0])
    assert ratio[0] == pytest.approx(1 - 3 / (4 * 13 - 1), abs=1e-3)  # Hedges' approximation
    assert (raw * ratio[0]).mean() == pytest.approx(0.8, abs=0.02)
    assert raw.mean() > 0.83


@pytest.mark.parametrize("shift", [-3.0, 0.0, 0.4, 60.0])
def test_effect_interval_inverts_the_noncentral_t(shift):
    differences = DRUG_1 - DRUG_1.mean() + shift
    found = effect_size(differences)
    t = stats.ttest_1samp(differences, 0).statistic
    root = math.sqrt(len(differences))
    assert stats.nct.cdf(t, 9, found.low * root) == pytest.approx(0.975, abs=1e-4)
    assert stats.nct.cdf(t, 9, found.high * root) == pytest.approx(0.025, abs=1e-4)


def test_effect_interval_excludes_zero_where_the_test_does():
    for scale in (0.5, 1.0, 2.0):
        differences = DRUG_1 - DRUG_1.mean() + scale
        interval, p = effect_size(differences), stats.ttest_1samp(differences, 0).pvalue
        assert (interval.low > 0) == (p < 0.05)


def test_holm_of_a_worked_example():
    """Ordered p times m, m - 1, ...; then made monotone: .01*4, .02*3, .03*2 (raised to .06), .04*1 (raised to .06)."""
    assert holm(np.array([0.04, 0.01, 0.03, 0.02])) == pytest.approx([0.06, 0.04, 0.06, 0.06])


def test_untested_contrast_counts_in_its_family():
    adjusted = holm(np.array([0.01, np.nan, 0.2]))
    assert adjusted[[0, 2]] == pytest.approx([0.03, 0.4])
    assert math.isnan(adjusted[1])
    assert len(holm(np.array([]))) == 0


def test_normality_is_reported_from_twenty_values(generator):
    values = generator.normal(5, 2, size=400)
    assert normality(values[:19]) is None
    assert len(normality(values[:20]).ordered) == 20
    assert normality(np.ones(30)) is None
    found = normality(values)
    assert (found.slope, found.intercept) == pytest.approx((values.std(), values.mean()), rel=0.05)
    assert found.ordered.tolist() == sorted(values)
    assert found.p == pytest.approx(stats.shapiro(values).pvalue)
    assert normality(np.exp(values)).p < 1e-6


def test_two_level_bootstrap_is_that_of_seeds_where_images_agree(generator):
    differences = generator.choice([-1, 0, 1], size=24, p=[0.2, 0.3, 0.5])
    a = np.repeat((differences > 0)[:, None], 60, axis=1)
    b = np.repeat((differences < 0)[:, None], 60, axis=1)
    found = two_level_bootstrap(a, b)
    expected = stats.bootstrap((100.0 * differences,), np.mean, method="percentile", rng=1).confidence_interval
    assert found.estimate == pytest.approx(100 * differences.mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=4.2)  # a step of 1 in 24


def test_two_level_bootstrap_is_that_of_images_where_seeds_agree(generator):
    differences = generator.choice([-1, 0, 1], size=500, p=[0.1, 0.7, 0.2])
    a, b = (np.repeat((sign * differences > 0)[None], 6, axis=0) for sign in (1, -1))
    found = two_level_bootstrap(a, b)
    expected = stats.bootstrap((100.0 * differences,), np.mean, method="percentile", rng=1).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.6)


def test_two_level_bootstrap_adds_both_variances(generator):
    """Owen 2007: without interaction the variance is that of the seeds' mean plus that of the images' mean."""
    seed_effect, image_effect = generator.normal(0, 0.03, size=(40, 1)), generator.normal(0, 0.5, size=(1, 900))
    effects = seed_effect + image_effect  # real-valued "correctness" keeps the levels additive
    found = two_level_bootstrap(effects, np.zeros_like(effects), n_resamples=4000)
    expected = 100 * 2 * 1.96 * math.sqrt(seed_effect.var() / 40 + image_effect.var() / 900)
    assert found.high - found.low == pytest.approx(expected, rel=0.05)


def test_two_level_bootstrap_repeats_and_needs_common_seeds(generator):
    a, b = generator.random((2, 3, 50)) < 0.8
    assert two_level_bootstrap(a, b, 100) == two_level_bootstrap(a, b, 100)
    assert two_level_bootstrap(a, b, 100) != two_level_bootstrap(a, b, 100, seed=1)
    assert math.isnan(two_level_bootstrap(a[:1], b[:1]).low)
    with pytest.raises(InputError, match=r"\(3, 50\) and \(2, 50\); use common seeds"):
        two_level_bootstrap(a, b[:2])


def test_subsets_widen_the_interval_by_nadeau_and_bengio():
    """With n_test / n_train = 1 / 4 and J = 10 the standard error is sqrt((0.1 + 0.25) / 0.1) times that of samples."""
    plain, corrected = summarize(DRUG_1), summarize_subsets(DRUG_1, 10_000, 40_000)
    factor = math.sqrt(0.35 / 0.1)
    assert corrected.mean == plain.mean
    assert corrected.high - corrected.mean == pytest.approx(factor * (plain.high - plain.mean))
    assert math.isnan(corrected.bca_low)


def test_subset_test_is_the_corrected_resampled_t_test():
    plain, corrected = compare_paired(DRUG_1, DRUG_2), compare_subsets(DRUG_1, DRUG_2, 10_000, 40_000)
    t = stats.ttest_rel(DRUG_1, DRUG_2).statistic / math.sqrt(3.5)
    assert corrected.p == pytest.approx(2 * stats.t.sf(abs(t), 9))
    assert corrected.p > plain.p
    assert (corrected.high > 0) == (corrected.p > 0.05)
    assert np.isnan([corrected.welch_p, corrected.effect]).all()


def test_more_subsets_never_remove_the_correlation():
    many = np.tile(DRUG_1, 1000)
    found = summarize_subsets(many, 10_000, 40_000)
    assert found.high - found.mean == pytest.approx(1.96 * many.std() * 0.5, rel=0.01)


def test_small_subsets_have_an_interval_that_covers_where_accuracy_is_linear_in_the_images(generator):
    """6 draws of 30 of 300 images, which are themselves a sample: the mean of all images that could be is 0."""
    covered = []
    for _ in range(1000):
        images = generator.normal(size=300)
        means = np.array([generator.choice(images, 30, replace=False).mean() for _ in range(6)])
        found = summarize_subsets(means, 270, 30)
        covered.append(found.low <= 0 <= found.high)
    assert 0.93 <= np.mean(covered) <= 0.97


def test_subsets_without_spread_have_no_interval():
    assert math.isnan(summarize_subsets(np.ones(5), 1, 4).low)
    assert math.isnan(compare_subsets(np.ones(5), np.zeros(5), 1, 4).p)


def test_power_of_the_issue_is_that_of_two_independent_samples():
    """ "sd .33: n = 5 sees a 0.4 point difference 39 % of the time" holds for the unpaired test of two arms of sd .33.

    Pairing arms whose seeds share nothing (sd of differences .33 * sqrt(2)) gives 31 %; it needs 13 seeds for 80 %.
    """
    assert TTestIndPower().power(0.4 / 0.33, 5, 0.05) == pytest.approx(0.39, abs=0.005)
    independent = 0.33 * math.sqrt(2)
    assert paired_power(independent, 5, *SEEN) == pytest.approx(0.314, abs=0.001)
    assert seeds_needed(independent, *SEEN) == 13
    assert paired_power(independent, 12, *SEEN) == pytest.approx(0.771, abs=0.001)


def test_power_is_what_simulation_finds(generator):
    samples = generator.normal(0.4, 0.5, size=(4000, 12))
    found = (stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05).mean()
    assert paired_power(0.5, 12, *SEEN) == pytest.approx(found, abs=0.025)


@pytest.mark.parametrize(
    ("effect", "n", "alpha"), [(3, 12, 0.0125), (5, 3, 0.0125), (15, 2, 0.0125), (20, 2, 0.05), (30, 2, 0.0125)]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_power_of_large_effects_is_that_of_the_near_tail(effect, n, alpha, sign):
    edge = stats.t.isf(alpha / 2, n - 1)
    assert math.isnan(stats.nct.cdf(-edge, n - 1, effect * math.sqrt(n)))  # why there is a way of our own
    expected = stats.nct.sf(edge, n - 1, effect * math.sqrt(n))
    assert paired_power(1, n, sign * effect, alpha) == pytest.approx(expected, abs=1e-9)


def test_power_has_a_value_for_every_effect():
    """At the one before the last, scipy has none for the near tail either."""
    found = [paired_power(1, n, effect, 0.01) for n in (2, 12, 24) for effect in (*np.geomspace(0.1, 1e4, 120), 1e6)]
    assert not np.isnan(found).any()
    assert found[-1] == 1


@pytest.mark.parametrize("sd", [0.1, 0.33, 1.0, 5.0])
def test_seeds_needed_are_the_fewest(sd):
    n = seeds_needed(sd, *SEEN)
    assert TTestPower().power(0.4 / sd, n, 0.05) >= 0.8
    assert n == 2 or TTestPower().power(0.4 / sd, n - 1, 0.05) < 0.8


def test_two_seeds_are_enough_where_the_spread_is_tiny():
    assert seeds_needed(0.001, *SEEN) == 2


def test_seeds_needed_out_of_reach_are_infinite():
    assert seeds_needed(200.0, *SEEN) == math.inf
