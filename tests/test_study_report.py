"""The report of a study: its numbers are those of the rows, its words claim no more than the plan allows."""

import html
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from scipy import stats
from study_parts import IG, KD, PRIMARY_CELLS, add_rows, edit_rows, primary_study

from studies.answers import NO_CONCLUSION, answers, is_aligned_against_control, is_overlay_against_none, lead
from studies.config import Cell, create_cell
from studies.cost import cost_against_teacher
from studies.facts import facts
from studies.figures import FIGURES, corruptions, quantiles
from studies.glance import glance
from studies.paper import ABLATION, COMPRESSION, PARAMETERS, arm_name, paper_results
from studies.report import write_report
from studies.results import StudyResults
from studies.rows import StudyRows
from studies.statistics import Comparison, paired_power
from studies.tables import (
    cells_table,
    contrast_table,
    corruption_table,
    number,
    paper_table,
    probability,
    signed,
    transfer_table,
)
from studies.trials import trials_table
from study_report import main
from timm_igkd.errors import InputError, MissingFileError
from timm_igkd.mobilenetv2_cifar import mobilenetv2_cifar
from timm_igkd.model_loading import count_parameters

ALIGNED = "KD&IG aligned"


class Page(HTMLParser):
    """Collects tags, ids and resources."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.resources, self.ids = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.resources += [attributes[key] for key in ("src", "href", "xlink:href", "data") if key in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []


def report(folder, *configs):
    """Write a report; return its Markdown and its page."""
    write_report(configs, folder / "RESULTS.md", folder / "page.html")
    return (folder / "RESULTS.md").read_text(encoding="utf-8"), (folder / "page.html").read_text(encoding="utf-8")


def said(results):
    return {question: " ".join(sentences) for question, sentences in answers(results)}


@pytest.fixture(scope="module")
def primary(tmp_path_factory):
    """A primary study in which aligned overlays help; one run is missing."""
    config = primary_study(tmp_path_factory.mktemp("primary"))
    add_rows(config, {ALIGNED: 1.0}, {ALIGNED: 2.0}, skip=[("KD&IG blank", 11)])
    return StudyResults.read(config)


@pytest.fixture(scope="module")
def pages(primary, tmp_path_factory):
    """Markdown and page of the primary study and one that was not run."""
    waiting = primary_study(tmp_path_factory.mktemp("none"), name="waiting", title="Waiting", purpose="exploratory")
    return report(tmp_path_factory.mktemp("pages"), primary.config, waiting)


# ---- numbers ----


def test_contrasts_are_scipys_on_the_rows(primary):
    found = primary.contrasts("top1")[0]
    a, b = (np.array(list(primary.values(cell, "top1").values())) for cell in (ALIGNED, "KD"))
    expected = stats.ttest_rel(a, b)
    assert found.comparison.p == pytest.approx(expected.pvalue)
    assert (found.comparison.low, found.comparison.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert found.comparison.welch_p == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue)


def test_power_is_that_of_04_points_at_the_observed_spread(primary):
    contrast = primary.contrasts("top1")[0]
    sd = primary.differences(contrast.a, contrast.b, "top1").std(ddof=1)
    assert contrast.power == pytest.approx(paired_power(sd, 12, 0.4))
    assert paired_power(sd, round(contrast.needed), 0.4) >= 0.8 > paired_power(sd, round(contrast.needed) - 1, 0.4)


def test_drawn_differences_are_those_of_the_contrast(primary):
    found = primary.differences(ALIGNED, "KD", "top1")
    assert found.mean() == pytest.approx(primary.compare(ALIGNED, "KD", "top1").difference)
    assert len(found) == 12


def test_holm_is_over_the_named_contrasts_of_one_outcome(primary):
    raw = [contrast.comparison.p for contrast in primary.contrasts("top1")]
    adjusted = [contrast.holm_p for contrast in primary.contrasts("top1")]
    assert min(adjusted) == pytest.approx(4 * min(raw))
    assert adjusted != [contrast.holm_p for contrast in primary.contrasts("corruption_top1")]


def test_missing_run_leaves_its_seed_out_of_its_contrast_only(primary):
    assert [contrast.comparison.n for contrast in primary.contrasts("top1")] == [12, 12, 12, 11]
    assert primary.missing == [("KD&IG blank", 11)]


def test_every_number_of_the_contrast_table_is_in_both_files(primary, pages):
    found = primary.contrasts("top1")[0].comparison
    for text in pages:
        assert signed(found.difference) in html.unescape(text)
        assert f"{signed(found.low)} to {signed(found.high)}" in html.unescape(text)


def test_bootstrap_is_recomputed_from_the_predictions(primary):
    found = primary.bootstrap(ALIGNED, "KD")
    assert found.estimate == pytest.approx(primary.contrasts("top1")[0].comparison.difference)
    assert found.low < found.estimate < found.high


def test_predictions_of_another_run_are_refused(tmp_path):
    config = primary_study(tmp_path, seeds=2)
    rows = add_rows(config)
    key = (config.run_hash(config.cells["KD"]), 1)
    np.save(tmp_path / "predictions" / f"{key[0]}-1.npy", np.zeros_like(rows.predictions(key)))
    with pytest.raises(InputError, match=r"give 10\.000 % top-1, their row says"):
        report(tmp_path, config)


def test_missing_predictions_are_named(tmp_path):
    config = primary_study(tmp_path, seeds=2)
    add_rows(config)
    name = f"{config.run_hash(config.cells['KD'])}-1.npy"
    (tmp_path / "predictions" / name).unlink()
    with pytest.raises(MissingFileError, match=name):
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


def test_transfer_table_is_the_mean_over_seeds_by_class(primary):
    runs = primary.runs["KD"].values()
    cat = float(np.mean([json.loads(row["transfer_per_class"])["cat"] for row in runs]))
    assert dict(transfer_table(primary).rows)["KD"][0].main == number(cat, 1)


def test_monte_carlo_runs_stand_beside_the_papers_without_a_test(tmp_path):
    config = primary_study(tmp_path, seeds=6, base={"drop": 5, "subset_fraction": 0.8}, purpose="exploratory")
    add_rows(config, gains={ALIGNED: 0.6}, base=90.6)
    results = StudyResults.read(config)
    rows = dict(paper_table(results).rows)
    mean, runs, _, p = rows["KD&IG aligned (Monte Carlo, 80 % subsets)"][2:]
    assert (mean.main, mean.detail, runs.main, p.main) == ("91.29", "sd 0.55", "60", "–")
    text = said(results)["What of the paper holds?"]
    assert "60 subsets" in text
    assert "The paper's +0.64 lies" in text
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


def test_cost_is_told_against_the_teachers(tmp_path):
    config = primary_study(tmp_path, seeds=1)
    add_rows(config)
    assert cost_against_teacher(StudyResults.read(config)) == []
    measured = {"macs": 2e6, "teacher_macs": 3e6, "latency_ms_1": 5, "teacher_latency_ms_1": 10, "latency_ms_64": 20}
    measured |= {"teacher_latency_ms_64": 80, "latency_threads": 2}
    edit_rows(tmp_path, lambda row: row.update(measured))
    sentence, paper = cost_against_teacher(StudyResults.read(config))
    for part in (
        "543,498 parameters",
        "1.5× fewer",
        "5\u202fms against 10\u202fms (2.0× faster)",
        "(4.0× faster)",
        "2 threads",
    ):
        assert part in sentence
    assert "cold" in paper
    edit_rows(tmp_path, lambda row: row.update(num_parameters=106_778))
    assert len(cost_against_teacher(StudyResults.read(config))) == 1


def test_all_studies_overlays_stand_at_a_glance(primary, tmp_path):
    check = primary_study(tmp_path / "check", seeds=3, name="check", purpose="check")
    add_rows(check)
    table = glance([primary, StudyResults.read(check)])
    controls = [other for other in PRIMARY_CELLS if other != ALIGNED]
    assert [name for name, _ in table.rows] == [f"Primary: {ALIGNED} − {other}" for other in controls]
    for (_, entries), contrast in zip(table.rows, primary.contrasts("top1"), strict=True):
        corrupted = primary.compare(contrast.a, contrast.b, "corruption_top1")
        assert entries[1].main == signed(contrast.comparison.difference)
        assert entries[2].main == probability(contrast.holm_p)
        assert entries[3].main == signed(corrupted.difference)
    subsets = primary_study(tmp_path / "subsets", base={"drop": 5, "subset_fraction": 0.8}, purpose="exploratory")
    assert glance([StudyResults.read(check), StudyResults.read(subsets)]) is None  # neither a result, nor run
    assert StudyResults.read(subsets).contrasts("top1")[0].comparison.n == 0
    write_report([primary.config], tmp_path / "a.md", tmp_path / "a.html")
    for path in (tmp_path / "a.md", tmp_path / "a.html"):
        assert path.read_text().count("At a glance") >= 1


def test_command_of_the_report_is_that_of_the_config(tmp_path):
    config = primary_study(tmp_path / "out", launch="--mixed_precision bf16")
    write_report([config], tmp_path / "a.md", tmp_path / "a.html")
    assert "accelerate launch --mixed_precision bf16 recipes/study.py --config" in (tmp_path / "a.md").read_text()


def test_corruption_table_is_the_mean_over_severities_and_seeds(primary):
    found = dict(corruption_table(primary).rows)["KD"]
    levels = [np.mean(list(primary.values("KD", f"corruption/jpeg/{severity}").values())) for severity in range(1, 6)]
    assert found[0].main == number(float(np.mean(levels)), 1)


@pytest.mark.parametrize(("value", "text"), [(-0.004, "+0.00"), (-0.25, "−0.25"), (math.nan, "–"), (0.5, "+0.50")])
def test_signed_numbers(value, text):
    assert signed(value) == text


def test_small_p_is_not_zero():
    assert [probability(p) for p in (0.0, 0.0004, 0.0006, math.nan)] == ["<0.001", "<0.001", "0.001", "–"]


# ---- words ----


def test_effect_of_a_primary_study_is_claimed_with_interval_and_n_for_this_teacher(primary):
    text = said(primary)["Does the overlay help clean accuracy?"]
    assert text.startswith("For this teacher, KD&IG aligned has higher clean accuracy than KD: +")
    assert "95\u202f% interval" in text
    assert "n = 12 seeds" in text
    assert "Holm-adjusted p" in text


def test_alignment_is_answered_against_the_controls(primary):
    text = said(primary)["Does it matter that the maps are aligned with their images?"]
    assert "clean accuracy over 3 of 3 controls; accuracy under corruption over 3 of 3 controls" in text
    assert "than KD:" not in text


def test_outcome_not_named_in_advance_is_not_claimed(primary):
    text = said(primary)["Does it help on foreign images of the same classes?"]
    assert "not named in advance, so nothing is claimed" in text


def test_no_effect_is_said_to_be_not_shown(tmp_path):
    config = primary_study(tmp_path)
    add_rows(config, {ALIGNED: 0.0}, seed_sd=0.6)
    results = StudyResults.read(config)
    assert not any(contrast.is_significant for contrast in results.contrasts("top1"))
    assert "no difference in clean accuracy is shown" in said(results)["Does the overlay help clean accuracy?"]
    assert "none of 4 contrasts" in lead([results])


def test_harm_is_said_as_such(tmp_path):
    config = primary_study(tmp_path)
    add_rows(config, {ALIGNED: -2.0})
    results = StudyResults.read(config)
    assert "has lower clean accuracy than KD" in said(results)["Does the overlay help clean accuracy?"]
    assert (
        "clean accuracy over 0 of 3 controls"
        in said(results)["Does it matter that the maps are aligned with their images?"]
    )


def test_unadjusted_significance_is_no_claim(tmp_path):
    """KD&IG aligned − KD has p = 0.02, which is 0.08 after Holm."""
    config = primary_study(tmp_path, seeds=6)
    add_rows(config, measured=False)
    above, around = (0.1, 0.5, 0.3, 0.6, 0.0, 0.4), (0.5, -0.5, 0.3, -0.3, 0.1, -0.1)

    def change(row):
        seed = int(row["seed"])
        aligned = 91 + above[seed]
        row["top1"] = {"KD": 91.0, ALIGNED: aligned}.get(row["cell"], aligned + around[seed])

    edit_rows(tmp_path, change)
    results = StudyResults.read(config)
    found = results.contrasts("top1")[0]
    assert found.comparison.p == pytest.approx(0.02, abs=0.002)
    assert found.holm_p == pytest.approx(4 * found.comparison.p)
    assert "no difference in clean accuracy is shown" in said(results)["Does the overlay help clean accuracy?"]


def test_contrast_that_changes_more_than_the_overlay_answers_no_question(tmp_path):
    cells = {
        "Student": {},
        "KD&IG": KD | IG,
        "released code": KD | IG | {"overlay_source": "shuffled", "logits": "shuffled"},
    }
    contrasts = (("KD&IG", "Student"), ("KD&IG", "released code"))
    config = primary_study(tmp_path, seeds=6, cells=cells, contrasts=contrasts, base={"drop": 9})
    add_rows(config, {"KD&IG": 3.0}, measured=False)
    results = StudyResults.read(config)
    assert all(contrast.is_significant for contrast in results.contrasts("top1"))
    assert list(said(results)) == ["What follows from the numbers?"]


def test_aligned_maps_at_another_setting_are_no_control():
    cell = create_cell("a", KD | IG)
    assert is_aligned_against_control(cell, create_cell("b", KD | IG | {"overlay_source": "blank"}))
    assert not is_aligned_against_control(cell, cell)
    assert not is_overlay_against_none(cell, cell)


def test_check_draws_no_conclusion(tmp_path):
    config = primary_study(tmp_path, seeds=3, purpose="check")
    add_rows(config, {ALIGNED: 5.0})
    for text in report(tmp_path, config):
        assert "draws no conclusion" in text
        assert NO_CONCLUSION in text
        assert "For this teacher" not in text
        assert "nothing is claimed" in text
    assert [question for question, _ in answers(StudyResults.read(config))] == ["What follows from the numbers?"]


def test_exploratory_study_claims_nothing(tmp_path):
    config = primary_study(tmp_path, purpose="exploratory", seeds=6)
    add_rows(config, {ALIGNED: 3.0})
    text = said(StudyResults.read(config))["Does the overlay help clean accuracy?"]
    assert "exploratory, so nothing is claimed" in text
    assert "For this teacher" not in text


def test_paper_difference_is_placed_in_our_interval(primary):
    text = said(primary)["What of the paper holds?"]
    found = primary.compare(ALIGNED, "KD", "top1")
    place = "inside" if found.low <= 0.4 <= found.high else "outside"
    assert f"Ours, KD&IG aligned − KD: {signed(found.difference)} points" in text
    assert f"The paper's +0.40 lies {place} our interval" in text


@pytest.mark.parametrize(
    ("gain", "words"),
    [(0.4, "lies inside our interval, which excludes 0"), (-0.5, "lies outside our interval, which excludes 0")],
)
def test_paper_difference_and_zero_are_placed_apart(tmp_path, gain, words):
    config = primary_study(tmp_path)
    add_rows(config, gains={ALIGNED: gain}, seed_sd=0.05, n_images=2000, measured=False)
    assert words in said(StudyResults.read(config))["What of the paper holds?"]


# ---- the paper's numbers ----


def test_parameters_of_the_paper_are_those_of_the_network():
    for drop, parameters in PARAMETERS.items():
        assert count_parameters(mobilenetv2_cifar(num_classes=10, drop_blocks=drop)) == parameters


def test_arms_are_named_as_in_the_paper():
    cells = [Cell(distill_loss_weight=kd, overlay_prob=ig) for kd in (0, 0.01) for ig in (0, 0.1)]
    assert [arm_name(cell) for cell in cells] == ["Student", "IG", "KD", "KD&IG"]
    assert arm_name(Cell(attention_loss_weight=0.8, logits="live", overlay_prob=0.1)) == "IG&AT"


def test_cells_stand_beside_both_tables_of_the_paper(primary):
    found = paper_results(primary.config, primary.cell(ALIGNED), PARAMETERS[5])
    assert [result for _, result in found] == [ABLATION["KD&IG"], COMPRESSION["KD&IG", 5]]
    assert [name for name, _ in paper_table(primary).rows if "permuted" in name or "blank" in name] == []


def test_parts_of_the_data_have_no_counterpart_in_the_paper(primary):
    for change in ({"train_limit": 5000}, {"test_limit": 5000}, {"evaluate_on": "validation"}):
        config = primary_study("unused", **change)
        assert paper_results(config, config.cells[ALIGNED], PARAMETERS[5]) == []


@pytest.mark.parametrize(
    "change",
    [{"epochs": 20}, {"overlay_prob": 0.5}, {"overlay_source": "noise"}, {"temperature": 4.0}, {"lr": 0.1}],
)
def test_other_settings_have_no_counterpart_in_the_paper(primary, change):
    config = primary_study("unused", cells={"a": KD | IG | change}, contrasts=())
    assert paper_results(config, config.cells["a"], PARAMETERS[5]) == []
    assert paper_results(primary.config, primary.cell(ALIGNED), 543_499) == []


# ---- pages ----


def test_page_is_self_contained_and_ids_are_unique(pages):
    page = Page(pages[1])
    assert all(resource.startswith(("#", "data:")) for resource in page.resources)
    assert not re.search(r"url\((?!#)|@import|https?://", pages[1])
    assert "script" not in page.tags
    assert len(set(page.ids)) == len(page.ids)
    assert "Interim: 59 of 60 runs" in pages[1]
    assert page.tags.count("svg") == 3  # contrasts, cells, corruptions
    assert "#01020" not in pages[1]


def test_study_without_rows_is_listed_with_its_command(pages):
    for text in pages:
        assert "Not run yet: 60 runs planned." in text
        assert "accelerate launch recipes/study.py --config recipes/configs/study_waiting.yaml" in text


def test_missing_runs_and_provenance_are_listed(primary, pages):
    for text in pages:
        assert "59 of 60 planned" in text
        assert "1 run: seed 11 of KD&amp;IG blank" in text or "1 run: seed 11 of KD&IG blank" in text
        for fact in ("one test machine", "abc1234", "torch 2.14", "weights t1"):
            assert fact in text


def test_equal_rows_give_equal_files(primary, pages, tmp_path):
    waiting = primary_study(tmp_path / "none", name="waiting", title="Waiting", purpose="exploratory")
    again = report(tmp_path, primary.config, waiting)
    assert again[1] == pages[1]
    assert again[0] == pages[0]


def test_order_of_rows_changes_nothing(tmp_path):
    config = primary_study(tmp_path, seeds=3)
    add_rows(config, measured=False)
    first = report(tmp_path, config)
    path = tmp_path / "results.csv"
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([header, *reversed(lines)]) + "\n")
    assert report(tmp_path, config) == first


def test_names_are_text_never_markup(tmp_path):
    hostile = "<script>alert(1)</script> | x"
    config = primary_study(tmp_path, seeds=2, title=hostile, cells=PRIMARY_CELLS | {hostile: {}})
    add_rows(config, measured=False)
    markdown, page = report(tmp_path, config)
    assert "<script" not in page
    assert "&lt;script&gt;alert" in page
    assert "| <script>alert(1)</script> \\| x |" in markdown


def test_one_seed_has_a_page_without_intervals(tmp_path):
    config = primary_study(tmp_path, seeds=1)
    add_rows(config)
    markdown, _ = report(tmp_path, config)
    assert "too few runs" in markdown
    assert "nan" not in markdown.lower().replace("provenance", "")


def test_metrics_that_were_not_measured_have_no_column(tmp_path):
    config = primary_study(tmp_path, seeds=2)
    add_rows(config, measured=False)
    results = StudyResults.read(config)
    assert not {"Corrupted, %", "IG similarity"} & set(cells_table(results).columns)
    assert corruption_table(results) is None
    assert contrast_table(results, "corruption_top1") is None
    assert corruptions(results, "x") is None


def test_quantile_plots_start_at_twenty_seeds(tmp_path):
    config = primary_study(tmp_path, seeds=20)
    add_rows(config, measured=False)
    assert "Shapiro-Wilk" in quantiles(StudyResults.read(config), "x")[0]
    assert quantiles(StudyResults.read(primary_study(tmp_path, seeds=19)), "x") is None


def test_compression_figure_shows_arms_of_several_sizes(tmp_path, primary):
    cells = {"Student": {"grid": {"drop": [5, 9]}}, "KD&IG": KD | IG | {"grid": {"drop": [5, 9]}}}
    config = primary_study(tmp_path, seeds=2, cells=cells, contrasts=(), base={}, purpose="exploratory")
    add_rows(config, measured=False)
    draw = dict(FIGURES)["Accuracy against compression"]
    svg, words = draw(StudyResults.read(config), "x")
    assert "KD&amp;IG − Student" in svg
    assert "KD&amp;IG, paper" in svg
    assert "12×" in svg
    assert "the paper's means" in words
    assert draw(primary, "x") is None


def test_compression_figure_pairs_arms_by_their_student(tmp_path, monkeypatch):
    students = {"deep": {"base": "test_resnet", "drop": 1}, "flat": {"base": "test_resnet", "drop": 2}}
    cells = {
        f"{arm}, drop {size}": settings | {"student": "igkd_truncated", "student_args": students[size]}
        for arm, settings in {"Student": {}, "KD": KD}.items()
        for size in students
    }
    config = primary_study(tmp_path, seeds=2, cells=cells, contrasts=(), base={}, purpose="exploratory")
    add_rows(config, measured=False)
    compared = []
    results = StudyResults.read(config)
    monkeypatch.setattr(type(results), "compare", lambda self, a, b, column: compared.append((a, b)) or Comparison(0))
    assert dict(FIGURES)["Accuracy against compression"](results, "x") is not None
    assert sorted(compared) == [("KD, drop deep", "Student, drop deep"), ("KD, drop flat", "Student, drop flat")]


def test_command_writes_the_report_of_yaml_files(tmp_path, capsys):
    settings = {"name": "one", "cells": {"Student": {"student": "test_resnet"}}, "seeds": 1}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(settings | {"output_dir": str(tmp_path / "out")}))
    files = [str(tmp_path / "a.md"), str(tmp_path / "a.html")]
    assert main([str(tmp_path / "one.yaml"), "--markdown", files[0], "--html", files[1]]) == 0
    assert f"--config {tmp_path / 'one.yaml'}" in (tmp_path / "a.md").read_text()
    assert main([str(tmp_path / "two.yaml"), "--markdown", files[0], "--html", files[1]]) == 2
    assert "two.yaml" in capsys.readouterr().err


def test_two_studies_of_one_name_are_refused(primary, tmp_path):
    with pytest.raises(InputError, match="each once"):
        report(tmp_path, primary.config, primary.config)


def test_rows_of_the_tests_are_those_of_the_study(primary):
    assert StudyRows(primary.config.output_dir).run_keys() == {
        (primary.config.run_hash(cell), seed)
        for name, cell in primary.config.cells.items()
        for seed in primary.config.seed_range
        if (name, seed) != ("KD&IG blank", 11)
    }
