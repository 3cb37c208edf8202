"""What a study says in words: no more than the plan allows."""

import html
import re

import pytest
from statsmodels.stats.multitest import multipletests
from study_parts import ALIGNED, IG, KD, add_rows, edit_rows, helpful_study, primary_study, report, said

from studies.answers import NO_CONCLUSION, answers
from studies.facts import facts
from studies.opening import opening
from studies.results import StudyResults
from studies.tables import signed


def test_effect_of_a_primary_study_is_claimed_with_interval_and_n_for_this_teacher(primary):
    text = said(primary)["Does the overlay help clean accuracy?"]
    assert text.startswith("For this teacher, on these test images, KD&IG aligned − KD, clean accuracy: higher, +")
    assert "95\u202f% interval" in text
    assert "n = 12 seeds" in text
    assert "Holm-adjusted p" in text


def test_alignment_is_answered_against_the_controls(primary):
    text = said(primary)["Does it matter that the maps are aligned with their images?"]
    assert text.startswith(
        "For this teacher, alignment is tested by aligned minus shuffled, the same maps of other images: "
        "clean accuracy is higher; accuracy under corruption is higher."
    )
    assert "− KD," not in text
    assert text.endswith("no edges and no untrained network's maps are among the arms.")


def test_outcome_not_named_in_advance_is_not_claimed(primary):
    text = said(primary)["Does it help on foreign images of the same classes?"]
    assert "not named in advance, so nothing is claimed" in text


def test_no_effect_is_said_to_be_not_shown(tmp_path):
    config = primary_study(tmp_path)
    add_rows(config, {ALIGNED: 0.0}, seed_sd=0.6)
    results = StudyResults.read(config)
    assert not any(contrast.is_significant for contrast in results.contrasts("top1"))
    assert "clean accuracy: not shown to differ, " in said(results)["Does the overlay help clean accuracy?"]
    assert "clean accuracy not shown to differ, " in opening([results])


def test_equivalence_within_the_smallest_effect_is_said(tmp_path):
    config = primary_study(tmp_path, smallest_effect={"top1": 0.2})
    add_rows(config, {ALIGNED: 0.0}, seed_sd=0.05)
    results = StudyResults.read(config)
    (kd, *_) = results.contrasts("top1")
    assert kd.is_equivalent
    text = said(results)["Does the overlay help clean accuracy?"]
    assert "KD&IG aligned − KD, clean accuracy: equivalent within ±0.2 points" in text
    assert "TOST, Holm-adjusted p = 0.001, 90" in text
    assert "clean accuracy equivalent within ±0.2 points" in opening([results])


def test_a_shown_difference_below_the_smallest_effect_is_said_to_be_small(tmp_path):
    config = primary_study(tmp_path, smallest_effect={"top1": 0.4})
    add_rows(config, {ALIGNED: 0.25}, seed_sd=0.02, n_images=10_000)
    results = StudyResults.read(config)
    text = said(results)["Does the overlay help clean accuracy?"]
    assert "clean accuracy: higher, by less than the 0.4 points that matter" in text
    assert "TOST, Holm-adjusted p <0.001, 90" in text
    assert "clean accuracy higher, by less than the 0.4 points that matter" in opening([results])


def test_neither_difference_nor_equivalence_is_said_as_such(tmp_path):
    config = primary_study(tmp_path, smallest_effect={"top1": 0.2}, seeds=6)
    add_rows(config, {ALIGNED: 0.0}, seed_sd=1.0)
    results = StudyResults.read(config)
    text = said(results)["Does the overlay help clean accuracy?"]
    assert "clean accuracy: not shown to differ, nor to be equivalent within ±0.2 points" in text
    assert "clean accuracy not shown to differ, nor to be equivalent within ±0.2 points" in opening([results])


def test_report_opens_with_effect_alignment_and_paper(primary):
    text = opening([primary])
    first, second, third = text.split("\n\n")[:3]
    assert first.startswith(
        "Does the overlay help? For this teacher, on these test images, aligned overlays against none (points, "
    )
    assert "clean accuracy higher, +" in first
    assert "accuracy under corruption higher, +" in first
    assert re.search(r"balanced transfer accuracy [+−].*; n = 12\), exploratory; robustness", first)
    asked = "Does alignment matter? Aligned maps against the same maps of other images, likewise: "
    assert second.startswith(f"{asked}clean accuracy higher, +")
    assert third.startswith("What of the paper holds? The paper reports +0.40 points (95")
    assert "+0.03 to +0.77, 10 runs each) for overlays beside KD, and −0.05 for the same arms in its table" in third
    ours = primary.compare(ALIGNED, "KD", "top1")
    interval = f"{signed(ours.low)} to {signed(ours.high)}, not adjusted; n = 12"
    assert f"here {signed(ours.difference)} (95\u202f% interval {interval}); the paper's +0.40 lies below" in third
    assert text.endswith("60 of 60 planned runs in 1 study are done.")


def test_report_opens_with_harm_as_such(tmp_path):
    config = primary_study(tmp_path)
    add_rows(config, {ALIGNED: -2.0})
    assert "clean accuracy lower, −" in opening([StudyResults.read(config)])


def test_unfinished_primary_study_claims_nothing(tmp_path):
    results = helpful_study(tmp_path, skip=[("KD&IG blank", 11)])
    assert "interim, the plan is not complete, so nothing is claimed" in " ".join(said(results).values())
    assert "For this teacher" not in " ".join(said(results).values())
    assert opening([results]).endswith("The primary study is not complete: nothing is claimed yet.")


def test_study_that_ended_early_claims_from_whole_seeds_alone(tmp_path):
    config = primary_study(tmp_path, ended="the time was over")
    add_rows(config, {ALIGNED: 1.0}, skip=[("KD&IG blank", 11)])
    results = StudyResults.read(config)
    assert {contrast.comparison.n for contrast in results.contrasts("top1")} == {11}
    assert "clean accuracy: higher" in said(results)["Does the overlay help clean accuracy?"]
    assert "the study ended before its plan was complete" in opening([results])
    told = dict(facts(results))
    assert told["Seeds that are not whole"] == "4 runs of them, in no mean and no contrast"
    assert told["Not run"] == "5 runs: seed 11 of KD, KD&IG aligned, KD&IG shuffled, KD&IG permuted, KD&IG blank"
    assert "Rows left out" not in told


def test_equivalence_is_adjusted_over_the_contrasts(tmp_path):
    config = primary_study(tmp_path, smallest_effect={"top1": 0.2})
    add_rows(config, {}, seed_sd=0.25)
    contrasts = StudyResults.read(config).contrasts("top1")
    raw = [contrast.equivalence.p for contrast in contrasts]
    adjusted = multipletests(raw, method="holm")[1]
    assert [contrast.equivalence_holm_p for contrast in contrasts] == pytest.approx(adjusted)


def test_harm_is_said_as_such(tmp_path):
    config = primary_study(tmp_path)
    add_rows(config, {ALIGNED: -2.0})
    results = StudyResults.read(config)
    assert "KD&IG aligned − KD, clean accuracy: lower" in said(results)["Does the overlay help clean accuracy?"]
    text = said(results)["Does it matter that the maps are aligned with their images?"]
    assert "clean accuracy is lower; accuracy under corruption is not shown to differ." in text


def test_alignment_rests_on_shuffled_maps_alone(tmp_path):
    config = primary_study(tmp_path)
    add_rows(config, {ALIGNED: 2.0, "KD&IG shuffled": 2.0})
    text = said(StudyResults.read(config))["Does it matter that the maps are aligned with their images?"]
    assert "clean accuracy is not shown to differ; " in text
    assert "KD&IG aligned − KD&IG permuted, clean accuracy: higher" in text


@pytest.mark.parametrize(
    ("gains", "shown"),
    [
        ({ALIGNED: 2.0}, "shown"),
        ({ALIGNED: 2.0, "KD&IG blank": 2.0}, "not shown"),
        ({"KD&IG blank": -2.0}, "not shown"),
    ],
)
def test_robustness_asks_for_a_gain_over_none_and_over_blank(tmp_path, gains, shown):
    config = primary_study(tmp_path)
    add_rows(config, {}, gains)
    results = StudyResults.read(config)
    clause = f"robustness, a gain over no overlays and over blank ones both, is {shown} (over none"
    assert said(results)["Does it help robustness to corruption?"].startswith(f"For this teacher, {clause}")
    assert clause in opening([results])


@pytest.mark.parametrize(
    ("gains", "clause"),
    [
        (
            {ALIGNED: 2.5, "KD&IG blank": 2.2},
            "is shown, by less than the 1 point that matters over blank ones (over none",
        ),
        ({ALIGNED: 0.6}, "is shown, by less than the 1 point that matters (over none"),
        (
            {ALIGNED: 2.0, "KD&IG blank": 2.0},
            "is not shown, a gain of the 1 point that matters is ruled out over blank ones (over none",
        ),
        ({ALIGNED: 2.5, "KD&IG blank": -2.5}, "is shown (over none"),
    ],
)
def test_robustness_is_limited_by_the_smaller_gain(tmp_path, gains, clause):
    config = primary_study(tmp_path, smallest_effect={"corruption_top1": 1.0})
    add_rows(config, {}, gains, seed_sd=0.05)
    assert f"both, {clause}" in opening([StudyResults.read(config)])


def test_opening_says_that_the_plan_was_amended(tmp_path):
    config = primary_study(tmp_path, amended="other machine.")
    add_rows(config, {ALIGNED: 2.0})
    assert "The plan was amended after its first run" in opening([StudyResults.read(config)])


@pytest.mark.parametrize(("planned", "is_told"), [(None, False), (12, False), (24, False), (6, True)])
def test_report_says_that_a_study_was_extended(tmp_path, planned, is_told):
    config = primary_study(tmp_path, planned_seeds=planned)
    add_rows(config, {ALIGNED: 2.0})
    for text in (opening([StudyResults.read(config)]), *report(tmp_path, config)):
        assert ("Its 6 seeds became 12 by the rule of the plan" in text) == is_told


def test_opening_is_one_paragraph_an_answer(tmp_path):
    config = primary_study(tmp_path, amended="other machine.")
    add_rows(config, {ALIGNED: 2.0})
    paragraphs = opening([StudyResults.read(config)]).split("\n\n")
    begin = ["Does the overlay help?", "Does alignment matter?", "The plan was amended", "60 of 60 planned runs"]
    assert [any(text.startswith(words) for text in paragraphs) for words in begin] == [True] * 4
    _, page = report(tmp_path, config)
    for paragraph in paragraphs:
        assert f'<p class="lead">{paragraph}</p>' in html.unescape(page)


def test_failed_runs_leave_too_few_seeds_for_a_claim(tmp_path):
    def fail(row):
        if row["cell"] == "KD" and int(row["seed"]) < 7:
            row["top1"] = "nan" if row["seed"] == "0" else "10.0"

    config = primary_study(tmp_path, failed_below=50)
    add_rows(config, {ALIGNED: 1.0})
    edit_rows(tmp_path, fail)
    results = StudyResults.read(config)
    text = said(results)["Does the overlay help clean accuracy?"]
    assert "fewer than 6 common seeds, so nothing is claimed" in text
    assert "n = 5), fewer than 6 common seeds, so nothing is claimed" in opening([results])
    assert "failed, and in no contrast, are KD 7 of 12, KD&IG aligned 0 of 12" in opening([results])
    assert said(results)["Did every run succeed?"].startswith("No: failed are KD 7 of 12, KD&IG aligned 0 of 12")
    assert results.contrasts("top1")[1].comparison.n == 12


def test_primary_study_is_withheld_until_its_file_asks_for_the_report(tmp_path):
    config = primary_study(tmp_path, report=False)
    add_rows(config, {ALIGNED: 1.0})
    results = StudyResults.read(config)
    waits = "nothing is shown or claimed until its file says report: true."
    assert opening([results]).endswith(f"The primary study is complete; {waits}")
    for text in report(tmp_path, config):
        assert "Complete; nothing is shown before the blind look at its spread" in text
        assert "clean accuracy" not in text.lower()


def test_study_that_ended_with_whole_seeds_waits_for_its_file_too(tmp_path):
    config = primary_study(tmp_path, report=False, ended="the time was over")
    add_rows(config, {ALIGNED: 1.0}, skip=[(name, seed) for name in config.cells for seed in range(6, 12)])
    results = StudyResults.read(config)
    waits = "nothing is shown or claimed until its file says report: true."
    assert opening([results]).endswith(f"The primary study is ended; {waits}")
    for text in report(tmp_path, config):
        assert "Ended; nothing is shown before the blind look at its spread" in text
        assert "fewer than 6" not in text


def test_run_under_the_accuracy_that_the_plan_asks_of_a_run_is_failed(tmp_path):
    def fail(row):
        if (row["cell"], row["seed"]) == ("KD", "3"):
            row["top1"] = "10.0"

    config = primary_study(tmp_path, failed_below=50)
    add_rows(config, {ALIGNED: 1.0})
    edit_rows(tmp_path, fail)
    results = StudyResults.read(config)
    for column in ("top1", "corruption_top1"):
        assert [contrast.comparison.n for contrast in results.contrasts(column)] == [11, 12, 12, 12]
    assert (
        dict(facts(results))["Failed"] == "1 of the runs, in no mean and no contrast: KD, seed 3 (top-1 10.00\u202f%)"
    )
    assert not results.missing


def test_study_that_ended_with_few_seeds_claims_nothing(tmp_path):
    config = primary_study(tmp_path, ended="the time was over")
    add_rows(config, {ALIGNED: 1.0}, skip=[(name, seed) for name in config.cells for seed in range(5, 12)])
    results = StudyResults.read(config)
    assert results.is_interim
    assert opening([results]).endswith("The primary study ended with fewer than 6 whole seeds: nothing is claimed.")


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
    assert "clean accuracy: not shown to differ" in said(results)["Does the overlay help clean accuracy?"]


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


def test_contrasts_of_an_exploratory_study_that_no_question_is_about_are_told_without_a_claim(tmp_path):
    cells = {"KD": KD, "KD&IG": KD | IG, "KD, longer": KD | {"epochs": 61}}
    contrasts = (("KD&IG", "KD"), ("KD&IG", "KD, longer"))
    config = primary_study(tmp_path, seeds=6, cells=cells, contrasts=contrasts, purpose="exploratory")
    add_rows(config, {"KD&IG": 3.0}, measured=False)
    found = said(StudyResults.read(config))
    assert "KD&IG − KD, longer, clean accuracy: +" in found["What do the other contrasts show?"]
    assert "exploratory, so nothing is claimed" in found["What do the other contrasts show?"]
    assert "longer" not in found["Does the overlay help clean accuracy?"]


def test_robustness_below_the_points_that_matter_is_said_to_be(tmp_path):
    config = primary_study(tmp_path, smallest_effect={"top1": 0.2, "corruption_top1": 1})
    add_rows(config, {ALIGNED: 0.4}, {ALIGNED: 0.6}, seed_sd=0.02, n_images=2000)
    text = opening([StudyResults.read(config)])
    assert "blank ones both, is shown, by less than the 1 point that matters (over none +0." in text


def test_runs_that_studies_share_are_counted_once(primary):
    again = StudyResults(primary.config, primary.runs, 0)
    assert opening([primary, again]).endswith("60 of 60 planned runs in 2 studies are done.")


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
