"""Intervals without scipy are scipy's."""

import pytest

from timm_igkd.intervals import Z_ONE_SIDED, Z_TWO_SIDED, wilson_interval


def test_wilsons_interval_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    for found, n in ((355, 360), (0, 10), (10, 10)):
        expected = stats.binomtest(found, n).proportion_ci(method="wilson")
        assert wilson_interval(found, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
        least = stats.binomtest(found, n, alternative="less").proportion_ci(method="wilson")
        assert wilson_interval(found, n, Z_ONE_SIDED)[1] == pytest.approx(least.high, abs=1e-12)


def test_the_normal_quantiles_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    assert pytest.approx(stats.norm.ppf([0.95, 0.975]), abs=1e-12) == (Z_ONE_SIDED, Z_TWO_SIDED)
