"""Numbers and tables of a study: those of its rows, by the statistics that the plan names."""

import json
import math

import numpy as np
import pytest
from command_lines import RECIPES
from scipy import stats
from study_parts import (
    ALIGNED,
    KD,
    PRIMARY_CELLS,
    add_rows,
    edit_predictions,
    edit_rows,
    primary_study,
    report,
    said,
)

from studies.config import load_study
from studies.facts import facts
from studies.glance import glance
from studies.opening import opening
from studies.paper_table import paper_table
from studies.report import write_report
from studies.results import StudyResults
from studies.statistics import paired_power
from studies.tables import (
    cells_table,
    contrast_table,
    corruption_table,
    number,
    probability,
    signed,
    transfer_table,
)
from studies.trials import trials_table
from timm_igkd.errors import InputError, MissingFileError


def test_contrasts_are_scipys_on_the_rows(helpful):
    found = helpful.contrasts("top1")[0]
    a, b = (np.array(list(helpful.values(cell, "top1").values())) for cell in (ALIGNED, "KD"))
    expected = stats.ttest_rel(a, b)
    assert found.comparison.p == pytest.approx(expected.pvalue)
    assert (found.comparison.low, found.comparison.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert found.comparison.welch_p == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue)


def test_power_is_that_of_04_points_at_the_observed_spread(helpful):
    contrast = helpful.contrasts("top1")[0]
    sd = helpful.differences(contrast.a, contrast.b, "top1").std(ddof=1)
    assert contrast.power == pytest.approx(paired_power(sd, 12, 0.4, 0.05))
    enough, fewer = (paired_power(sd, round(contrast.needed) - less, 0.4, 0.05) for less in (0, 1))
    assert enough >= 0.8 > fewer


def test_drawn_differences_are_those_of_the_contrast(helpful):
    found = helpful.differences(ALIGNED, "KD", "top1")
    assert found.mean() == pytest.approx(helpful.compare(ALIGNED, "KD", "top1").difference)
    assert len(found) == 12


def test_holm_is_over_the_named_contrasts_of_one_outcome(helpful):
    raw = [contrast.comparison.p for contrast in helpful.contrasts("top1")]
    adjusted = [contrast.holm_p for contrast in helpful.contrasts("top1")]
    assert min(adjusted) == pytest.approx(4 * min(raw))
    assert adjusted != [contrast.holm_p for contrast in helpful.contrasts("corruption_top1")]


def test_missing_run_leaves_its_seed_out_of_its_contrast_only(helpful):
    assert [contrast.comparison.n for contrast in helpful.contrasts("top1")] == [12, 12, 12, 11]
    assert helpful.missing == [("KD&IG blank", 11)]


def test_bootstrap_is_recomputed_from_the_predictions(helpful):
    found = helpful.bootstrap(ALIGNED, "KD")
    assert found.estimate == pytest.approx(helpful.contrasts("top1")[0].comparison.difference)
    assert found.low < found.estimate < found.high


def test_predictions_of_another_run_are_refused(tmp_path):
    config = primary_study(tmp_path, seeds=2)
    add_rows(config)
    name = f"{config.run_hash(config.cells['KD'])}-1"
    edit_predictions(tmp_path, lambda arrays: arrays | {name: np.zeros_like(arrays[name])})
    with pytest.raises(InputError, match=rf"{name} give 10\.000 % top-1, their row says"):
        report(tmp_path, config)


def test_predictions_of_fewer_images_are_refused(tmp_path):
    config = primary_study(tmp_path, seeds=2)
    add_rows(config)
    name = f"{config.run_hash(config.cells['KD'])}-1"
    edit_predictions(tmp_path, lambda arrays: arrays | {name: arrays[name][:-1]})
    with pytest.raises(InputError, match=rf"{name} have shape \(399,\), expected that of the labels, \(400,\)"):
        report(tmp_path, config)


def test_missing_predictions_are_named(tmp_path):
    config = primary_study(tmp_path, seeds=2)
    add_rows(config)
    name = f"{config.run_hash(config.cells['KD'])}-1"
    edit_predictions(tmp_path, lambda arrays: {key: values for key, values in arrays.items() if key != name})
    with pytest.raises(MissingFileError, match=f"lacks the entry '{name}'"):
        report(tmp_path, config)


def test_rows_of_other_settings_and_seeds_are_left_out(tmp_path):
    config = primary_study(tmp_path, seeds=3)
    add_rows(config)
    smaller = primary_study(tmp_path, seeds=2, base={"drop": 5, "epochs": 100})
    assert StudyResults.read(smaller).left_out == 5
    changed = StudyResults.read(primary_study(tmp_path, seeds=3, base={"drop": 5, "epochs": 50}))
    assert (changed.left_out, changed.rows) == (15, [])
    assert "15, of other settings" in dict(facts(changed))["Rows left out"]


def test_a_run_belongs_to_the_cell_of_its_settings_whatever_its_name(tmp_path):
    add_rows(primary_study(tmp_path, seeds=2))
    renamed = {"renamed" if name == "KD" else name: cell for name, cell in PRIMARY_CELLS.items()}
    results = StudyResults.read(primary_study(tmp_path, seeds=2, cells=renamed, contrasts=()))
    assert len(results.values("renamed", "top1")) == 2


def test_text_in_a_number_column_is_named(tmp_path):
    config = primary_study(tmp_path, seeds=2)
    add_rows(config)
    edit_rows(tmp_path, lambda row: row.update(ece="low"))
    with pytest.raises(InputError, match=r"column 'ece' of results\.csv must hold numbers, found 'low'"):
        report(tmp_path, config)


def test_monte_carlo_runs_are_no_independent_samples(tmp_path):
    config = primary_study(tmp_path, seeds=6, base={"drop": 5, "subset_fraction": 0.8}, purpose="exploratory")
    add_rows(config, n_images=1000)
    results = StudyResults.read(config)
    values = np.array(list(results.values("KD", "top1").values()))
    half = stats.t.ppf(0.975, 5) * values.std(ddof=1) * math.sqrt(1 / 6 + 10_000 / 40_000)
    assert results.summary("KD", "top1").high == pytest.approx(values.mean() + half)
    contrast = results.contrasts("top1")[0]
    assert np.isnan([contrast.comparison.welch_p, contrast.comparison.effect, contrast.power]).all()
    assert results.bootstrap(ALIGNED, "KD") is None
    assert "10,000/40,000" in cells_table(results).note
    table = contrast_table(results, "top1")
    assert "Corrected resampled t test" in table.note
    assert table.columns == ["Common subsets", "Difference, points", "Corrected p", "Holm p"]
    assert {len(entries) for _, entries in table.rows} == {4}
    assert "n = 6 subsets" in said(results)["Does the overlay help clean accuracy?"]


def test_images_left_out_of_a_subset_are_counted_not_estimated(tmp_path):
    config = primary_study(tmp_path, seeds=6, base={"drop": 5, "subset_fraction": 0.8}, purpose="exploratory")
    add_rows(config)
    edit_rows(tmp_path, lambda row: row.update(n_train=4002, n_left_out=998))
    results = StudyResults.read(config)
    assert results.resample_sizes("KD") == (998, 4002)
    assert "998/4,002" in cells_table(results).note


def test_variance_of_subsets_is_told_as_it_is_taken(tmp_path):
    cells = {name: KD | {"subset_fraction": share} for name, share in (("tenth", 0.1), ("most", 0.8), ("rest", 0.8))}
    cells["rest"] |= {"temperature": 4}
    config = primary_study(tmp_path, seeds=6, cells=cells, contrasts=(), purpose="exploratory")
    add_rows(config)
    results = StudyResults.read(config)
    note = cells_table(results).note
    assert "(1/J + trained on/left out) sd² (draws of less than half hardly overlap)" in note
    assert "trained on/left out = 5,000/45,000 or (1/J + left out/trained on) sd² (Nadeau and Bengio)" in note
    assert note.count("sd²") == 2
    summary = results.summary("tenth", "top1")
    half = stats.t.ppf(0.975, 5) * summary.sd * (1 / 6 + 5_000 / 45_000) ** 0.5
    assert summary.high - summary.mean == pytest.approx(half)


def test_committed_subsets_of_5000_images_left_out_998(monkeypatch):
    """Their rows do not say it: class by class rounded, 80 % of 5,000 images are 4,002."""
    monkeypatch.chdir(RECIPES.parent)
    results = StudyResults.read(load_study("recipes/configs/study_cpu_monte_carlo.yaml"))
    assert results.resample_sizes("KD") == (998, 4002)
    contrast = results.contrasts("top1")[0]
    assert contrast.comparison.p == pytest.approx(0.1892, abs=5e-5)
    assert contrast.holm_p == pytest.approx(0.3784, abs=5e-5)


def test_failed_runs_are_in_no_mean_by_class(tmp_path):
    def fail(row):
        if (row["cell"], row["seed"]) == ("KD", "0"):
            row.update(top1="10.0", transfer_per_class=json.dumps({"cat": 0.0, "dog": 0.0}))

    config = primary_study(tmp_path, seeds=3, failed_below=50)
    add_rows(config)
    edit_rows(tmp_path, fail)
    results = StudyResults.read(config)
    cat = np.mean([json.loads(results.runs["KD"][seed]["transfer_per_class"])["cat"] for seed in (1, 2)])
    assert dict(transfer_table(results).rows)["KD"][0].main == number(float(cat), 1)
    edit_rows(tmp_path, lambda row: row["cell"] == "KD" and row.update(top1="10.0"))
    assert "KD" not in dict(transfer_table(StudyResults.read(config)).rows)


def test_transfer_table_is_the_mean_over_seeds_by_class(helpful):
    runs = helpful.runs["KD"].values()
    cat = float(np.mean([json.loads(row["transfer_per_class"])["cat"] for row in runs]))
    assert dict(transfer_table(helpful).rows)["KD"][0].main == number(cat, 1)


def test_monte_carlo_runs_stand_beside_the_papers_without_a_test(tmp_path):
    config = primary_study(tmp_path, seeds=6, base={"drop": 5, "subset_fraction": 0.8}, purpose="exploratory")
    add_rows(config, gains={ALIGNED: 0.6}, base=90.6)
    results = StudyResults.read(config)
    rows = dict(paper_table(results).rows)
    mean, runs, _, p = rows["KD&IG aligned (Monte Carlo, 80 % subsets)"][2:]
    assert (mean.main, mean.detail, runs.main, p.main) == ("91.29", "sd 0.55", "60", "–")
    text = said(results)["What of the paper holds?"]
    assert "60 subsets" in text
    assert "the paper's +0.64 lies" in text
    assert "+0.40" not in text


def test_best_trial_of_every_arm_is_by_its_validation_mean(tmp_path):
    cells = {"KD": KD | {"grid": {"temperature": [1.5, 4.0]}}, "IG": {"grid": {"overlay_prob": [0.1, 0.5]}}}
    config = primary_study(tmp_path, seeds=3, cells=cells, contrasts=(), evaluate_on="validation")
    add_rows(config, gains={"KD, temperature 4.0": 3, "IG, overlay_prob 0.5": -3}, measured=False)
    results = StudyResults.read(config)
    rows = {arm: [entry.main for entry in entries] for arm, entries in trials_table(results).rows}
    assert {arm: row[:2] for arm, row in rows.items()} == {
        "KD": ["2", "temperature 4.0"],
        "IG": ["2", "overlay_prob 0.1"],
    }
    assert rows["KD"][2] == number(results.summary("KD, temperature 4.0", "top1").mean)
    assert rows["KD"][3] == number(results.summary("KD, temperature 1.5", "top1").mean)
    assert trials_table(StudyResults.read(primary_study(tmp_path / "test", seeds=1))) is None


def test_all_studies_overlays_stand_at_a_glance(helpful, tmp_path):
    check = primary_study(tmp_path / "check", seeds=3, name="check", purpose="check")
    add_rows(check)
    table = glance([helpful, StudyResults.read(check)])
    controls = [other for other in PRIMARY_CELLS if other != ALIGNED]
    heading, *rows = table.rows
    assert heading == ("Primary", [])
    assert [name for name, _ in rows] == [f"{ALIGNED} − {other}" for other in controls]
    for (_, entries), contrast in zip(rows, helpful.contrasts("top1"), strict=True):
        corrupted = helpful.compare(contrast.a, contrast.b, "corruption_top1")
        assert entries[1].main == signed(contrast.comparison.difference)
        assert entries[2].main == probability(contrast.holm_p)
        assert entries[3].main == signed(corrupted.difference)
    assert [entries[4].main for _, entries in rows] == [
        probability(contrast.holm_p) for contrast in helpful.contrasts("corruption_top1")
    ]
    again = primary_study(helpful.config.output_dir, name="again", purpose="exploratory")
    assert glance([helpful, StudyResults.read(again)]) == table  # runs that two studies share stand once
    subsets = primary_study(tmp_path / "subsets", base={"drop": 5, "subset_fraction": 0.8}, purpose="exploratory")
    assert glance([StudyResults.read(check), StudyResults.read(subsets)]) is None  # neither a result, nor run
    assert StudyResults.read(subsets).contrasts("top1")[0].comparison.n == 0
    write_report([helpful.config], tmp_path / "a.md", tmp_path / "a.html")
    for path in (tmp_path / "a.md", tmp_path / "a.html"):
        assert path.read_text().count("At a glance") >= 1


def test_runs_of_two_teachers_are_counted_and_shown_both(helpful, tmp_path):
    other = primary_study(tmp_path, name="second", title="Second", purpose="exploratory", teacher="local-dir:b/teacher")
    add_rows(other)
    edit_rows(tmp_path, lambda row: row.update(teacher_hash="t2"))
    both = [helpful, StudyResults.read(other)]
    assert opening(both).startswith("119 of 120 planned runs in 2 studies are done.")
    assert [name for name, entries in glance(both).rows if not entries] == ["Primary", "Second"]
    assert len(glance(both).rows) == 2 * (1 + len(other.contrasts))


def test_command_of_the_report_is_that_of_the_config(tmp_path):
    config = primary_study(tmp_path / "out", launch="--mixed_precision bf16")
    write_report([config], tmp_path / "a.md", tmp_path / "a.html")
    assert "accelerate launch --mixed_precision bf16 recipes/study.py --config" in (tmp_path / "a.md").read_text()


def test_corruption_table_is_the_mean_over_severities_and_seeds(helpful):
    found = dict(corruption_table(helpful).rows)["KD"]
    levels = [np.mean(list(helpful.values("KD", f"corruption/jpeg/{severity}").values())) for severity in range(1, 6)]
    assert found[0].main == number(float(np.mean(levels)), 1)


@pytest.mark.parametrize(("value", "text"), [(-0.004, "+0.00"), (-0.25, "−0.25"), (math.nan, "–"), (0.5, "+0.50")])
def test_signed_numbers(value, text):
    assert signed(value) == text


def test_small_p_is_not_zero():
    assert [probability(p) for p in (0.0, 0.0004, 0.0006, math.nan)] == ["<0.001", "<0.001", "0.001", "–"]
