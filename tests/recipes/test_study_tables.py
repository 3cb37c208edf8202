"""The contrast table, column by column: the plan's statistics, computed again by scipy and closed forms."""

import math

import numpy as np
import pytest
from scipy import optimize, special, stats
from study_parts import ALIGNED, KD, add_rows, edit_rows, primary_study

from studies.contrast import Contrast
from studies.results import StudyResults
from studies.tables import Entry, Table, contrast_table, number, probability, signed, span
from studies.trials import trials_table

FAMILY = 4  # contrasts of a primary study
BOUNDS = {"top1": 0.5, "corruption_top1": 0.8}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> StudyResults:
    """Return a study of small differences, so that no p is near 0 or 1; a run is missing in one contrast."""
    folder = tmp_path_factory.mktemp("rows")
    config = primary_study(folder, seeds=9, smallest_effect=BOUNDS)
    gains = {ALIGNED: 0.35, "KD&IG shuffled": 0.1, "KD&IG blank": 0.25}
    add_rows(config, gains, {ALIGNED: 0.5}, skip=[("KD&IG blank", 8)], seed_sd=0.7, n_images=2000)
    noise = np.random.default_rng(0)
    edit_rows(folder, lambda row: row.update(corruption_top1=float(row["corruption_top1"]) + noise.normal(0, 0.7)))
    return StudyResults.read(config)


@pytest.fixture(scope="module")
def subsets(tmp_path_factory: pytest.TempPathFactory) -> StudyResults:
    """Return a study of Monte Carlo subsets of 80 %."""
    base = {"drop": 5, "subset_fraction": 0.8}
    config = primary_study(tmp_path_factory.mktemp("rows"), seeds=9, base=base, purpose="exploratory")
    add_rows(config, {ALIGNED: 0.6, "KD&IG shuffled": 0.1, "KD&IG blank": 0.3}, n_images=2000)
    return StudyResults.read(config)


def pairs(results: StudyResults, contrast: Contrast, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of both cells on their common seeds, read from the rows."""
    first, second = (results.runs[name] for name in (contrast.a, contrast.b))
    seeds = sorted(first.keys() & second.keys())
    a, b = (np.array([float(runs[seed][column]) for seed in seeds]) for runs in (first, second))
    return a, b


def step_down(p_values: list[float]) -> list[float]:
    """Return Holm's p: the k-th smallest times the number of those not smaller, and no less than the one before."""
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = least
    return adjusted


def larger_one_sided_p(differences: np.ndarray, bound: float) -> float:
    above = stats.ttest_1samp(differences, -bound, alternative="greater").pvalue
    below = stats.ttest_1samp(differences, bound, alternative="less").pvalue
    return float(max(above, below))


def power(sd: float, n: int, wanted: float, alpha: float) -> float:
    """Return the power of the two-sided paired t test by the noncentral t."""
    shift, border = wanted / sd * math.sqrt(n), stats.t.ppf(1 - alpha / 2, n - 1)
    return float(stats.nct.sf(border, n - 1, shift) + stats.nct.cdf(-border, n - 1, shift))


def effect_entry(differences: np.ndarray) -> Entry:
    """Return Hedges' d_z, and the noncentralities that put the observed t at 97.5 % and 2.5 %, over sqrt(n)."""
    n, ratio = len(differences), differences.mean() / differences.std(ddof=1)
    hedges = special.gamma((n - 1) / 2) / special.gamma((n - 2) / 2) / math.sqrt((n - 1) / 2)
    t = ratio * math.sqrt(n)
    low, high = (
        optimize.brentq(lambda shift, level=level: stats.nct.cdf(t, n - 1, shift) - level, t - 8, t + 8) / math.sqrt(n)
        for level in (0.975, 0.025)
    )
    return Entry(number(hedges * ratio), span(low, high))


def power_entry(sd: float, n: int, wanted: float) -> Entry:
    found, strict = (f"{100 * power(sd, n, wanted, alpha):.0f}\u202f%" for alpha in (0.05, 0.05 / FAMILY))
    needed = next(n for n in range(2, 1000) if power(sd, n, wanted, 0.05) >= 0.8)
    return Entry(found, f"{strict} in Holm's first step; 80\u202f% needs n = {needed}")


def expected_rows(results: StudyResults, column: str) -> dict[str, dict[str, Entry]]:
    """Return contrast -> column of the table -> what must stand there."""
    contrasts, bound = results.contrasts(column), BOUNDS[column]
    values = {contrast.name: pairs(results, contrast, column) for contrast in contrasts}
    holm = step_down([float(stats.ttest_rel(*of).pvalue) for of in values.values()])
    tost = step_down([larger_one_sided_p(a - b, bound) for a, b in values.values()])
    rows = {}
    for (name, (a, b)), holm_p, tost_holm in zip(values.items(), holm, tost, strict=True):
        differences, paired, welch = a - b, stats.ttest_rel(a, b), stats.ttest_ind(a, b, equal_var=False)
        n, sd = len(a), float(differences.std(ddof=1))
        within = stats.t.interval(0.90, n - 1, loc=differences.mean(), scale=stats.sem(differences))
        interval = span(*paired.confidence_interval(0.95), sign=True)
        rows[name] = {
            "Common seeds": Entry(str(n)),
            "Difference, points": Entry(signed(differences.mean()), f"{interval}; sd {number(sd)}"),
            "Paired p": Entry(probability(paired.pvalue)),
            "Holm p": Entry(probability(holm_p)),
            "Welch p": Entry(probability(welch.pvalue), span(*welch.confidence_interval(0.95), sign=True)),
            "Effect size d_z": effect_entry(differences),
            f"TOST p, ±{bound:g} points": Entry(
                probability(larger_one_sided_p(differences, bound)),
                f"Holm {probability(tost_holm)}; {span(*within, sign=True)}",
            ),
            f"Power at {bound:g} points": power_entry(sd, n, bound),
        }
    return rows


def entries_of(table: Table) -> dict[str, dict[str, Entry]]:
    return {name: dict(zip(table.columns, entries, strict=True)) for name, entries in table.rows}


@pytest.mark.parametrize("column", BOUNDS)
def test_every_column_of_the_contrast_table_is_scipys(results, column):
    found = entries_of(contrast_table(results, column))
    expected = expected_rows(results, column)
    assert list(found) == list(expected)
    for name, row in expected.items():
        bootstrap = {"Over seeds and test images"} if column == "top1" else set()
        assert found[name].keys() == row.keys() | bootstrap
        assert {key: found[name][key] for key in row} == row
    ps = {tuple(row[key].main for row in expected.values()) for key in ("Paired p", "Holm p", "Welch p")}
    assert len(ps) == 3  # no column of these rows can stand for another


@pytest.mark.parametrize("column", BOUNDS)
def test_every_column_of_the_contrast_table_is_its_contrasts(results, column):
    found, bound = entries_of(contrast_table(results, column)), BOUNDS[column]
    for contrast in results.contrasts(column):
        row, compared, within = found[contrast.name], contrast.comparison, contrast.equivalence
        assert row["Common seeds"].main == str(compared.n)
        assert row["Difference, points"].main == signed(compared.difference)
        assert row["Difference, points"].detail.startswith(span(compared.low, compared.high, sign=True))
        assert row["Paired p"].main == probability(compared.p)
        assert row["Holm p"].main == probability(contrast.holm_p)
        assert row["Welch p"].main == probability(compared.welch_p)
        assert row["Effect size d_z"] == (number(compared.effect), span(compared.effect_low, compared.effect_high))
        assert row[f"TOST p, ±{bound:g} points"].main == probability(within.p)
        assert f"Holm {probability(contrast.equivalence_holm_p)};" in row[f"TOST p, ±{bound:g} points"].detail
        assert row[f"Power at {bound:g} points"].main == f"{100 * contrast.power:.0f}\u202f%"


def test_clean_accuracy_has_the_bootstrap_of_its_answers(results):
    found = entries_of(contrast_table(results, "top1"))
    for contrast in results.contrasts("top1"):
        interval = results.bootstrap(contrast.a, contrast.b)
        assert found[contrast.name]["Over seeds and test images"] == (span(interval.low, interval.high, sign=True), "")


def test_outcome_without_a_smallest_effect_has_no_column_of_it(tmp_path):
    config = primary_study(tmp_path, seeds=3, smallest_effect={"top1": 0.5})
    add_rows(config)
    columns = contrast_table(StudyResults.read(config), "corruption_top1").columns
    assert columns == ["Common seeds", "Difference, points", "Paired p", "Holm p", "Welch p", "Effect size d_z"]


def test_contrast_table_of_subsets_has_the_corrected_test_of_nadeau_and_bengio(subsets):
    contrasts, expected = subsets.contrasts("top1"), {}
    for contrast in contrasts:
        a, b = pairs(subsets, contrast, "top1")
        n, mean, sd = len(a), float((a - b).mean()), float((a - b).std(ddof=1))
        error = sd * math.sqrt(1 / n + 10_000 / 40_000)
        p = float(2 * stats.t.sf(abs(mean) / error, n - 1))
        interval = span(*stats.t.interval(0.95, n - 1, loc=mean, scale=error), sign=True)
        expected[contrast.name] = (n, p, Entry(signed(mean), f"{interval}; sd {number(sd)}"))
    adjusted = step_down([p for _, p, _ in expected.values()])
    assert entries_of(contrast_table(subsets, "top1")) == {
        name: {
            "Common subsets": Entry(str(n)),
            "Difference, points": difference,
            "Corrected p": Entry(probability(p)),
            "Holm p": Entry(probability(holm_p)),
        }
        for (name, (n, p, difference)), holm_p in zip(expected.items(), adjusted, strict=True)
    }
    assert [contrast.holm_p for contrast in contrasts] == pytest.approx(adjusted)
    assert [contrast.comparison.p for contrast in contrasts] == pytest.approx([p for _, p, _ in expected.values()])


def validation_study(folder, cells, seeds=3):
    return primary_study(
        folder, seeds=seeds, cells=cells, contrasts=(), evaluate_on="validation", purpose="exploratory"
    )


def test_cells_without_a_grid_are_the_trials_of_one_choice(tmp_path):
    cells = {f"KD at {temperature}": KD | {"temperature": temperature} for temperature in (1.5, 4.0, 8.0)}
    config = validation_study(tmp_path, cells)
    add_rows(config, gains={"KD at 4.0": 3, "KD at 8.0": -3}, measured=False)
    results = StudyResults.read(config)
    best, worst = (number(results.summary(name, "top1").mean) for name in ("KD at 4.0", "KD at 8.0"))
    assert trials_table(results).rows == [("All cells", [("3", ""), ("KD at 4.0", ""), (best, ""), (worst, "")])]


def test_a_single_trial_is_no_choice(tmp_path):
    config = validation_study(tmp_path, {"Student": {}}, seeds=2)
    add_rows(config, measured=False)
    assert trials_table(StudyResults.read(config)) is None
