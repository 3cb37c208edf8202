"""Which students are measured for a budget, and in which order."""

import re

import pytest
import timm
from students_parts import SIDE, TABLE, TEACHER, tiny

from timm_igkd import truncate
from timm_igkd.errors import InputError
from timm_igkd.export.budget import Budget
from timm_igkd.export.candidates import (
    MOST_OF_A_FAMILY,
    Architecture,
    Candidate,
    Chooser,
    candidates,
    rank,
    read_architectures,
    size_mb,
    truncations,
)
from timm_igkd.models.loading import count_macs, count_parameters, load_model


def candidate(name="resnet18", macs=100, weights=True, parameters=10, drop=0):
    return Candidate(name, drop, weights, parameters, macs)


def of(teacher):
    return candidates(teacher, 10, TEACHER, True, TABLE)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "mobilenetv3_small_050"])
def test_rows_of_the_table_are_what_the_architectures_have(name):
    (row,) = [row for row in read_architectures() if row.name == name]
    model = timm.create_model(name, num_classes=7)
    assert row.parameters + 7 * row.per_class == count_parameters(model)
    assert (row.size, row.macs - count_macs(model)) == (
        model.pretrained_cfg["input_size"][1],
        993 * (row.per_class - 1),
    )
    assert timm.is_model_pretrained(f"{name}.{row.weights}")


def test_table_is_small_and_holds_most_of_timm():
    rows = read_architectures()
    assert len(rows) > 500
    assert len({row.name for row in rows}) == len(rows)
    assert sum(bool(row.weights) for row in rows) > 300


def test_only_what_is_smaller_than_the_teacher_is_a_candidate():
    slow = Architecture("resnet18", 224, 1000, 10, 10**12, "a1_in1k")
    found = candidates(tiny(), 10, TEACHER, True, [*TABLE, slow])
    names = {c.name for c in found if not c.drop}
    assert names == {"test_convnext.r160_in1k", "test_efficientnet.r160_in1k", "lcnet_035"}


def test_the_teachers_own_architecture_is_no_candidate():
    """With fewer classes it is smaller than the teacher."""
    teacher = load_model("resnet18", pretrained=False, img_size=96)
    table = [row for row in read_architectures() if row.name in ("resnet18", "resnet14t")]
    found = candidates(teacher, 10, "resnet18", False, table)
    assert {candidate.name.split(".")[0] for candidate in found if not candidate.drop} == {"resnet14t"}


def test_candidates_are_counted_for_their_classes_and_size():
    (found,) = [c for c in of(tiny()) if c.name == "lcnet_035"]
    assert (found.num_parameters, found.macs) == (350_000 + 10 * 1281, round(30_000_000 * (SIDE / 224) ** 2))
    assert not found.has_weights


def test_int8_lets_four_times_the_parameters_into_a_size():
    floats, int8 = (size_mb(candidate(parameters=100_000), Budget(max_size_mb=1, int8=int8)) for int8 in (False, True))
    assert (floats, int8) == (0.4, 0.1)


def test_truncations_are_counted_as_they_are_built():
    teacher = tiny("test_resnet")
    found = truncations(teacher, 7, "mine", True)
    assert [c.drop for c in found] == [1, 2, 3, 4]
    built = truncate(teacher, 2, 7)
    assert (found[1].num_parameters, found[1].macs) == (count_parameters(built), count_macs(built))
    assert found[1] == Candidate("mine", 2, True, found[1].num_parameters, found[1].macs)
    assert next(teacher.parameters()).device.type == "cpu"


def test_teacher_that_cannot_be_cut_has_no_truncations():
    teacher = load_model("hrnet_w18_small", pretrained=False, img_size=64)
    assert truncations(teacher, 7, "hrnet_w18_small", True) == []


def test_truncations_that_would_leave_everything_are_none():
    coat = load_model("coat_tiny", pretrained=False, img_size=64).requires_grad_(False)
    (only,) = truncations(coat, 1000, "coat_tiny", True)
    assert only.drop == 3
    assert only.num_parameters < count_parameters(coat) / 4


def test_those_with_weights_come_first():
    assert max([candidate(parameters=900, weights=False), candidate(parameters=1)], key=rank).has_weights


def test_of_two_that_are_alike_the_one_of_more_parameters_comes_first():
    assert max([candidate(macs=900, parameters=1), candidate(macs=1, parameters=2)], key=rank).num_parameters == 2


def test_next_is_the_best_that_is_predicted_to_be_fast_enough():
    pool = [candidate(macs=macs) for macs in (50, 200, 120)]
    chooser = Chooser(pool, max_latency_ms=1.5, rate=0.01)
    assert [chooser.next().macs for _ in range(3)] == [120, 50, 200]
    assert chooser.next() is None


def test_prediction_follows_the_family_and_for_others_all_that_was_measured():
    chooser = Chooser([], max_latency_ms=1.0, rate=0.01)
    chooser.learn(candidate("resnet18.a1_in1k", macs=100), 10.0)
    chooser.learn(candidate("tf_mobilenetv3_small_100", macs=100), 30.0)
    assert chooser.predict(candidate("resnet10t", macs=10)) == pytest.approx(1.0)
    assert chooser.predict(candidate("mobilenetv3_large_100", macs=10)) == pytest.approx(3.0)
    assert chooser.predict(candidate("mobilenetv2_100", macs=10)) == pytest.approx(2.0)


def test_without_a_latency_everything_is_fast_enough():
    chooser = Chooser([candidate(macs=macs) for macs in (1, 10**12)], max_latency_ms=None, rate=1.0)
    assert chooser.next().macs == 10**12


def test_a_family_is_measured_a_few_times_only():
    chooser = Chooser([candidate(macs=macs) for macs in range(1, 11)] + [candidate("vit", 1)], None, 1.0)
    found = []
    while (chosen := chooser.next()) is not None:
        chooser.learn(chosen, 1.0)
        found.append(chosen.family)
    assert found == ["resnet"] * MOST_OF_A_FAMILY + ["vit"]


def test_truncations_are_measured_first():
    pool = [candidate("vit", parameters=99), candidate(drop=1, parameters=1), candidate(drop=2, macs=10**9)]
    chooser = Chooser(pool, max_latency_ms=1.5, rate=0.01)
    assert [chooser.next() for _ in range(3)] == [pool[1], pool[0], pool[2]]


def test_truncations_are_a_family_of_their_own():
    assert candidate(drop=1).family != candidate().family


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "for a budget, got none; give --max-latency-ms X"),
        ({"int8": True}, "for a budget, got none"),
        ({"max_latency_ms": 0.0}, "max_latency_ms must be above 0 and finite, got 0"),
        ({"max_size_mb": float("nan")}, "max_size_mb must be above 0 and finite, got nan"),
        ({"max_size_mb": float("inf")}, "max_size_mb must be above 0 and finite, got inf"),
    ],
)
def test_budget_without_a_limit_is_refused(options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Budget(**options)


def test_budget_allows_what_is_within_both_limits():
    budget = Budget(5.0, 2.0)
    assert budget.allows(5.0, 2.0)
    assert not budget.allows(5.1, 2.0)
    assert not budget.allows(5.0, 2.1)
    assert Budget(max_size_mb=2.0).allows(1e9, 2.0)
