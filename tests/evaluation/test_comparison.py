"""Differences between students: intervals over test images and over seeds, against scipy and statsmodels."""

import numpy as np
import pytest

from timm_igkd.errors import InputError
from timm_igkd.evaluation.comparison import compare_arms, image_interval, seed_interval

stats = pytest.importorskip("scipy.stats", reason="scipy is the reference; pip install 'timm-igkd[study]'")


def answers(n: int, won: int, lost: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what two models have right: `won` images only the first, `lost` only the second, half of the rest both."""
    first, second = np.arange(n) % 2 == 0, np.arange(n) % 2 == 0
    first[:won], second[:won] = True, False
    first[won : won + lost], second[won : won + lost] = False, True
    return first, second


@pytest.mark.parametrize(("n", "won", "lost"), [(10, 3, 1), (360, 9, 2), (360, 0, 0), (5000, 200, 310)])
def test_interval_over_images_is_scipys_normal_one_with_an_image_won_and_one_lost(n, won, lost):
    first, second = answers(n, won, lost)
    differences = np.concatenate([first.astype(float) - second.astype(float), [1.0, -1.0]])
    expected = stats.norm.interval(0.95, differences.mean(), differences.std() / np.sqrt(n + 2))
    assert image_interval(first, second) == pytest.approx([100 * end for end in expected])


def test_interval_over_images_of_a_worked_example():
    # n 98, b 11, c 3: p 0.12, q 0.04, half 1.959964 * sqrt((0.16 - 0.0064) / 100)
    assert image_interval(*answers(98, 11, 3)) == pytest.approx((8 - 7.68148, 8 + 7.68148), abs=1e-4)


@pytest.mark.parametrize("won", range(1, 12))
def test_interval_over_images_leaves_out_zero_where_mcnemars_exact_test_does(won):
    tables = pytest.importorskip("statsmodels.stats.contingency_tables", reason="statsmodels is the reference")
    p = tables.mcnemar([[100, won], [0, 100]], exact=True).pvalue
    low, _ = image_interval(*answers(400, won, 0))
    assert (low > 0) == (p < 0.05)


def test_interval_over_seeds_is_scipys_paired_one():
    arm, baseline = [90.1, 91.3, 90.2, 92.0], [89.9, 90.0, 90.4, 91.1]
    expected = stats.ttest_rel(arm, baseline).confidence_interval(0.95)
    found = seed_interval([a - b for a, b in zip(arm, baseline, strict=True)])
    assert found == pytest.approx((expected.low, expected.high))


def test_models_are_compared_on_the_same_images():
    with pytest.raises(InputError, match=r"same images, got \(3,\) and \(2,\)"):
        image_interval(np.ones(3, bool), np.ones(2, bool))


def test_one_seed_is_compared_over_its_images():
    (found,) = compare_arms(dict(zip([("kd", 7), ("alone", 7)], answers(100, 12, 2), strict=True)))
    assert (found.arm, found.baseline, found.over, found.n) == ("kd", "alone", "images", 100)
    assert found.points == pytest.approx(10)
    assert (found.low, found.high) == image_interval(*answers(100, 12, 2))
    assert found.is_shown


def test_several_seeds_are_compared_over_seeds_each_with_its_own_partner():
    right = {}
    for seed, (won, lost) in enumerate([(4, 1), (6, 1), (5, 3)]):
        right["kd_overlay", seed], right["kd", seed] = answers(100, won, lost)
    (found,) = compare_arms(right)
    assert (found.over, found.n, found.points) == ("seeds", 3, pytest.approx(10 / 3))
    expected = stats.ttest_1samp([3, 5, 2], 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert not found.is_shown


def test_the_same_difference_in_every_seed_shows_nothing():
    right = {}
    for seed in range(3):
        right["kd", seed], right["alone", seed] = answers(100, 9, 0)
    (found,) = compare_arms(right)
    assert (found.points, found.low, found.is_shown) == (9, None, False)


def test_all_arms_answer_three_questions():
    right = {(arm, 0): answers(10, 1, 0)[0] for arm in ("alone", "kd", "kd_overlay", "kd_longer")}
    found = [(difference.arm, difference.baseline) for difference in compare_arms(right)]
    assert found == [("kd", "alone"), ("kd_overlay", "kd"), ("kd_overlay", "kd_longer")]


def test_a_difference_is_shown_below_zero_too():
    (found,) = compare_arms(dict(zip([("kd", 0), ("alone", 0)], answers(100, 0, 12), strict=True)))
    assert found.is_shown
    assert found.points == -12


def test_no_interval_leaves_what_a_difference_can_be():
    assert image_interval(*answers(3, 3, 0))[1] == 100
    assert image_interval(*answers(3, 0, 3))[0] == -100
