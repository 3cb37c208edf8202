"""The comparison of a run's students in words, and what a damaged one is told."""

from dataclasses import asdict, replace
from typing import Any

import pytest
from tiny_parts import NUMBERS

from timm_igkd.errors import InputError
from timm_igkd.evaluation.comparison import ArmResult, Comparison, Difference, teaching_of
from timm_igkd.report.run_files import parse_metrics
from timm_igkd.report.verdict import arm_rows, verdict


def compared(points: float, low: float | None, high: float | None, seeds: int = 1) -> Comparison:
    students = tuple(
        ArmResult(arm, seed, 20, 98.0 + seed, 0.1, 0.02, 360, 97.5, 12.0)
        for seed in range(seeds)
        for arm in ("alone", "kd")
    )
    over: Any = "images" if seeds == 1 else "seeds"
    return Comparison(students, (Difference("kd", "alone", over, 360 if seeds == 1 else seeds, points, low, high),))


@pytest.mark.parametrize(
    ("points", "low", "high", "words"),
    [
        (1.2, 0.3, 2.1, "KD against the student alone: better by 1.2 points of top-1 (95\u202f% interval +0.3 to +2.1"),
        (-1.2, -2.1, -0.3, "KD against the student alone: worse by 1.2 points of top-1 (95\u202f% interval \u22122.1"),
        (
            0.2,
            0.03,
            0.37,
            "KD against the student alone: better by 0.20 points of top-1 (95\u202f% interval +0.03 to +0.37",
        ),
        (
            -0.02,
            -0.04,
            -0.004,
            "KD against the student alone: worse by 0.020 points of top-1 (95\u202f% interval \u22120.040",
        ),
        (
            -0.03,
            -0.8,
            0.74,
            "KD against the student alone: no difference shown (+0.0 points of top-1; 95\u202f% interval \u22120.8",
        ),
        (0.3, -0.8, 1.4, "KD against the student alone: no difference shown (+0.3 points of top-1; 95\u202f% interval"),
    ],
)
def test_a_difference_is_better_worse_or_not_shown(points, low, high, words):
    sentence, scope = verdict(compared(points, low, high))
    assert sentence.startswith(words)
    assert sentence.endswith("paired over 360 test images).")
    assert scope == "One seed compares only these students; for a statement about the method, add --seeds 3 or more."


def test_several_seeds_speak_about_the_method():
    sentence, scope = verdict(compared(0.5, 0.1, 0.9, seeds=3))
    assert "paired over 3 seeds" in sentence
    assert scope.startswith("From 3 seeds, this is about the method with this teacher on these images;")
    assert scope.endswith("the intervals are not adjusted for the number of differences.")


def test_seeds_that_all_differ_by_the_same_show_nothing():
    sentence, _ = verdict(compared(0.5, None, None, seeds=3))
    assert sentence.endswith(
        "KD against the student alone: +0.50 points of top-1, the same in all 3 seeds, so without interval."
    )


def test_a_row_of_several_seeds_has_their_mean_and_spread():
    assert arm_rows(compared(0.5, 0.1, 0.9))[0][:3] == ("the student alone", "20", "98.0\u202f%")
    assert arm_rows(compared(0.5, 0.1, 0.9, seeds=3))[0][2] == "99.0\u202f% (sd 1.00, n = 3)"


def test_comparison_comes_back_from_metrics():
    found = compared(0.5, None, None, seeds=3)
    content = asdict(found)
    lists = {name: [dict(item) for item in content[name]] for name in ("students", "differences")}
    assert parse_metrics(NUMBERS | {"arms": lists}, "metrics.json").arms == found
    assert verdict(None) == []


def test_a_damaged_comparison_is_refused_in_one_line():
    with pytest.raises(InputError, match=r"metrics\.json: arms: differences"):
        parse_metrics(NUMBERS | {"arms": {"students": [], "differences": [{"arm": "<script>"}]}}, "metrics.json")


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ((0.9, 0.0, 0.0), "KD"),
        ((0.0, 0.8, 0.0), "attention transfer"),
        ((0.0, 0.0, 1.0), "the teacher's explanations"),
        ((0.5, 0.8, 1.0), "KD + attention transfer + the teacher's explanations"),
    ],
)
def test_arms_are_called_by_what_they_learn_from_the_teacher(weights, words):
    names = ("distill_loss_weight", "attention_loss_weight", "explanation_loss_weight")
    teaching = teaching_of(dict(zip(names, weights, strict=True)))
    assert teaching == words
    found = replace(compared(1.2, 0.3, 2.1), teaching=teaching)
    assert verdict(found)[0].startswith(f"{words} against the student alone: better by 1.2 points")
    assert [row[0] for row in arm_rows(found)] == ["the student alone", words]
    overlaid = replace(found.differences[0], arm="kd_overlay", baseline="kd_longer")
    told = verdict(replace(found, differences=(overlaid,)))[0]
    assert told.startswith(f"{words} + overlay against {words} for as many more epochs as the maps cost: better")
    lists = asdict(found) | {name: [dict(each) for each in asdict(found)[name]] for name in ("students", "differences")}
    assert parse_metrics(NUMBERS | {"arms": lists}, "metrics.json").arms == found


def test_images_that_the_student_alone_went_without_are_told_with_the_difference():
    told = verdict(replace(compared(1.2, 0.3, 2.1), num_unlabeled=1500))[-1]
    assert told.endswith(" All but the student alone also learnt from 1,500 images without labels.")
