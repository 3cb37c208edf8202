"""The interval of a benchmark's median ratio says how often it covers, and does."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

_SPEC = importlib.util.spec_from_file_location("paired", Path(__file__).parents[1] / "benchmarks" / "paired.py")
paired = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(paired)


@pytest.mark.parametrize("n", [*range(2, 31), 100])
def test_interval_goes_between_the_highest_pair_of_ranks_that_covers_95_percent(n):
    found = paired.summarize(np.random.default_rng(n).permutation(n) + 1.0)
    low, high = found["interval"]
    assert (found["n"], found["median"], low + high) == (n, (n + 1) / 2, n + 1)
    assert found["level_percent"] == pytest.approx(100 * (1 - 2 * stats.binom.cdf(low - 1, n, 0.5)))
    assert found["level_percent"] >= 95 or (n < 6 and low == 1)
    assert 100 * (1 - 2 * stats.binom.cdf(low, n, 0.5)) < 95  # the next pair does not


@pytest.mark.parametrize(("n", "level"), [(3, 75.0), (5, 93.75), (7, 98.4375), (9, 96.09375)])
def test_interval_covers_the_median_as_often_as_it_says(n, level):
    generator, count = np.random.default_rng(0), 4_000
    rounds = [paired.summarize(generator.lognormal(0, 0.2, n)) for _ in range(count)]
    assert {found["level_percent"] for found in rounds} == {level}
    covered = np.mean([found["interval"][0] <= 1 <= found["interval"][1] for found in rounds])
    assert 100 * covered == pytest.approx(level, abs=4 * 50 / np.sqrt(count))


def test_one_round_has_no_interval():
    assert paired.summarize([2.0]) == {"median": 2.0, "interval": [2.0, 2.0], "level_percent": 0.0, "n": 1}
