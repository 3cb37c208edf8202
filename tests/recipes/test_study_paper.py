"""A study beside the paper: its differences, its tables, and what has no counterpart in it."""

import pytest
from study_parts import ALIGNED, IG, KD, add_rows, primary_study, said

from studies.cells import Cell
from studies.paper import ABLATION, COMPRESSION, PARAMETERS, arm_name, paper_results
from studies.paper_table import paper_table
from studies.results import StudyResults
from studies.tables import signed
from timm_igkd.models.loading import count_parameters
from timm_igkd.models.mobilenetv2_cifar import mobilenetv2_cifar


def test_paper_difference_is_placed_in_our_interval(primary):
    text = said(primary)["What of the paper holds?"]
    found = primary.compare(ALIGNED, "KD", "top1")
    place = "below" if found.low > 0.4 else "above" if found.high < 0.4 else "inside"
    assert f"Ours, KD&IG aligned − KD: {signed(found.difference)} points" in text
    assert f"; the paper's +0.40 lies {place} our interval" in text


@pytest.mark.parametrize(
    ("gain", "words"),
    [(0.4, "lies inside our interval, which excludes 0"), (-0.5, "lies above our interval, which excludes 0")],
)
def test_paper_difference_and_zero_are_placed_apart(tmp_path, gain, words):
    config = primary_study(tmp_path)
    add_rows(config, gains={ALIGNED: gain}, seed_sd=0.05, n_images=2000, measured=False)
    assert words in said(StudyResults.read(config))["What of the paper holds?"]


def test_parameters_of_the_paper_are_those_of_the_network():
    for drop, parameters in PARAMETERS.items():
        assert count_parameters(mobilenetv2_cifar(num_classes=10, drop_blocks=drop)) == parameters


def test_arms_are_named_as_in_the_paper():
    cells = [Cell(distill_loss_weight=kd, overlay_prob=ig) for kd in (0, 0.01) for ig in (0, 0.1)]
    assert [arm_name(cell) for cell in cells] == ["Student", "IG", "KD", "KD&IG"]
    assert arm_name(Cell(explanation_loss_weight=1.0, overlay_prob=0.1, map_method="grad_cam")) == "grad_cam&E"
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
