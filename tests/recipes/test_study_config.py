"""The settings of a study: published files, grids, hashes, and the errors of wrong ones."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from command_lines import RECIPES
from study_parts import ARMS, STUDENT

from studies.cells import ADDED, Cell, create_cell
from studies.config import StudyConfig, load_study
from timm_igkd.errors import InputError
from timm_igkd.models.loading import count_parameters
from timm_igkd.runs.parsing import parse_config

CONFIGS = sorted((RECIPES / "configs").glob("study_*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_published_configs_load_and_their_students_can_be_built(path: Path):
    config = load_study(path)
    assert path.stem == f"study_{config.name}"
    assert str(path.relative_to(RECIPES.parent)) in path.read_text()  # the command in its header
    for student, arguments in {(cell.student, json.dumps(cell.student_args)) for cell in config.cells.values()}:
        if student is not None:
            model = timm.create_model(student, num_classes=10, **json.loads(arguments)).eval()
            assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_primary_family_is_that_of_its_plan():
    config = load_study(RECIPES / "configs" / "study_real.yaml")
    assert config.purpose == "primary"
    assert config.seeds >= 12
    assert config.outcomes == ("top1", "corruption_top1")
    assert [b for a, b in config.contrasts if a == "KD&IG aligned"] == [
        "KD", "KD&IG shuffled", "KD&IG permuted", "KD&IG blank"
    ]  # fmt: skip
    (kd, *overlaid) = config.cells.values()
    for cell in overlaid:
        assert replace(cell, overlay_prob=0.0, overlay_source="aligned") == kd
        assert (cell.overlay_prob, cell.overlay_weight, cell.overlay_max_power) == (0.1, 0.5, 2.0)
    student = timm.create_model(kd.student, num_classes=10, **kd.student_args)
    assert count_parameters(student) <= 543_498


@pytest.mark.parametrize("name", ["real_arms", "real_cost", "real_often", "real_explanation"])
def test_exploratory_studies_take_over_the_rows_of_the_primary_one(name):
    primary, other = (load_study(RECIPES / "configs" / f"study_{study}.yaml") for study in ("real", name))
    assert other.run_hash(other.cells["KD"]) == primary.run_hash(primary.cells["KD"])
    if "KD&IG" in other.cells:
        assert other.run_hash(other.cells["KD&IG"]) == primary.run_hash(primary.cells["KD&IG aligned"])
    assert other.rows_of == (primary.output_dir,)
    assert set(other.seed_range) <= set(primary.seed_range)


def test_longer_kd_of_the_study_of_cost_takes_the_time_of_the_maps():
    hours = json.loads((RECIPES.parent / "benchmarks/results/pipeline_cpu.json").read_text())["hours"]["ours"]
    cells = load_study(RECIPES / "configs" / "study_real_cost.yaml").cells
    ten = cells["KD"].epochs
    assert cells["KD, 61 epochs"].epochs == pytest.approx(ten * (1 + hours["maps"] / hours["training"]), rel=0.1)


@pytest.mark.parametrize(
    "path",
    [path for path in CONFIGS if path.stem.startswith("study_real_") and path.stem != "study_real_kd"],
    ids=lambda path: path.stem,
)
def test_students_kd_setting_is_that_of_the_primary_study(path: Path):
    kd = load_study(RECIPES / "configs" / "study_real.yaml").cells["KD"]
    for cell in load_study(path).cells.values():
        if cell.distill_loss_weight:
            assert (cell.distill_loss_weight, cell.temperature) == (kd.distill_loss_weight, kd.temperature)


def test_grid_makes_a_cell_of_every_combination():
    config = StudyConfig(
        name="x",
        teacher="test_resnet",
        cells={"KD": {"distill_loss_weight": 0.1, "grid": {"drop": [1, 2], "lr": [1e-3, 1e-2]}}},
    )
    assert list(config.cells) == [
        "KD, drop 1, lr 0.001",
        "KD, drop 1, lr 0.01",
        "KD, drop 2, lr 0.001",
        "KD, drop 2, lr 0.01",
    ]
    assert config.cells["KD, drop 2, lr 0.01"].drop == 2


def test_hash_follows_what_changes_numbers_and_nothing_else():
    config = StudyConfig(name="x", teacher="test_resnet", cells=ARMS, base=STUDENT)
    elsewhere = StudyConfig(name="x", dataset="/other/place", teacher="resnet18", cells=ARMS, base=STUDENT, parallel=4)
    limited = StudyConfig(name="x", teacher="test_resnet", cells=ARMS, base=STUDENT, train_limit=5)
    cell = config.cells["KD"]
    assert config.run_hash(cell) == elsewhere.run_hash(cell)
    assert config.run_hash(cell) != limited.run_hash(cell)
    assert config.run_hash(cell) != config.run_hash(config.cells["Student"])


def test_settings_that_came_later_change_the_hash_where_they_are_used_alone():
    config = StudyConfig(name="x", teacher="test_resnet", cells=ARMS, base=STUDENT)
    assert not set(ADDED) & set(config.settings(config.cells["KD"])["cell"])
    for used in (
        {"model_ema": True}, {"clip_grad": 1.0}, {"model_ema_decay": 0.5}, {"map_method": "grad_cam"},
        {"explanation_loss_weight": 1.0}, {"explanation_map": "grad_cam"},
    ):  # fmt: skip
        cells = {name: settings | used for name, settings in ARMS.items()}
        other = StudyConfig(name="x", teacher="test_resnet", cells=cells, base=STUDENT)
        assert other.run_hash(other.cells["KD"]) != config.run_hash(config.cells["KD"])


def test_cell_settings_win_over_the_protocols():
    cell = create_cell("c", {"protocol": "modern", "student": "resnet18", "lr": "1e-2"})
    assert (cell.opt, cell.lr, cell.logits, cell.cutout) == ("sgd", 0.01, "live", 8)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({}, "has no cells"),
        ({"a": {"overlay_porb": 0.1}}, "cell 'a' has an unknown setting 'overlay_porb' .did you mean 'overlay_prob'"),
        ({"a": {"overlay_prob": 2}}, "cell 'a': overlay_prob must be in"),
        ({"a": {"protocol": "papr"}}, "cell 'a': protocol must be one of"),
        ({"a": {"overlay_source": "alined"}}, "cell 'a': overlay_source must be .* 'aligned'"),
        ({"a": {"opt": "adm"}}, "cell 'a': unknown optimiser 'adm'"),
        ({"a": {"loss_type": "kll"}}, "cell 'a': unknown loss_type 'kll'"),
        ({"a": {"attention_loss_weight": 1}}, "cell 'a': attention transfer needs the teacher in the loop"),
        ({"a": {"explanation_loss_weight": -1}}, "cell 'a': explanation_loss_weight must be"),
        ({"a": {"explanation_map": "saliency"}}, "cell 'a': explanation_map must be"),
        ({"a": {"map_method": "cam"}}, "cell 'a': map_method must be"),
        ({"a": {"map_method": "none"}}, "cell 'a': map_method none makes no maps"),
        ({"a": {"map_method": "saliency", "overlay_source": "random_teacher"}}, "cell 'a': maps of a random_teacher"),
        ({"a": {"temperature": 0}}, "cell 'a': temperature must be positive"),
        ({"a": {"subset_fraction": 0}}, "cell 'a': subset_fraction must be in"),
        ({"a": {"grid": {"drop": 3}}}, "cell 'a': grid drop must be a list"),
        ({"a": {"epochs": 0}}, "cell 'a': epochs must be at least 1"),
        ({"a": "KD"}, "cell 'a' must hold settings by name, got str"),
        ({"a": [1]}, "cell 'a' must hold settings by name, got list"),
        ({"a": {"grid": 3}}, "cell 'a': grid must hold lists by name, got int"),
        ({"a": {"grid": {"drop": [1, 1]}}}, "cell 'a, drop 1' is there twice"),
        ({"a": {"grid": {"drop": [1, 2]}}, "a, drop 1": {"lr": 0.1}}, "cell 'a, drop 1' is there twice"),
        ({"a": {"drop": 1}, "b": {"drop": 1, "save": True}}, "cells 'a' and 'b' have the same settings"),
    ],
)
def test_wrong_cells_are_named(cells, message):
    with pytest.raises(InputError, match=message):
        StudyConfig(name="x", teacher="test_resnet", cells=cells)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"name": "a/b"}, "name is a part of folder names"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"contrasts": [["KD", "Sutdent"]]}, "names an unknown cell .did you mean 'Student'"),
        ({"contrasts": [["KD", {}]]}, "names an unknown cell"),
        ({"contrasts": [["KD"]]}, "contrasts are pairs of cells"),
        ({"contrasts": [["KD", "KD"]]}, "is of one cell with itself"),
        ({"contrasts": [["KD&IG", "KD"], ["KD", "Student"], ["KD&IG", "KD"]]}, "is there twice"),
        ({"contrasts": [["KD&IG", "KD"], ["KD", "KD&IG"]]}, "is there twice"),
        ({"outcomes": ["top1", "corruption_top_1"]}, "got 'corruption_top_1' .did you mean 'corruption_top1'"),
        ({"outcomes": ["ece"]}, "outcomes are in percent, of which more is better, got 'ece'"),
        ({"outcomes": ["top1", "top1"]}, "outcomes are named once each"),
        ({"outcomes": []}, "has no outcomes"),
        ({"teacher": None}, "cell 'KD' needs a teacher"),
        ({"n_steps": 0}, "n_steps must be at least 1, got 0"),
        (
            {"base": STUDENT | {"explanation_loss_weight": 1.0}, "compile": "default"},
            "explanation loss, which cannot be",
        ),
    ],
)
def test_wrong_studies_are_refused(flags, message):
    with pytest.raises(InputError, match=message):
        StudyConfig(**{"name": "x", "teacher": "test_resnet", "cells": ARMS, "base": STUDENT} | flags)


def test_parse_config_reads_a_study(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("name: x\nteacher: test_resnet\ncells:\n  KD: {distill_loss_weight: 1e-2}\n")
    config = parse_config(StudyConfig, ["--config", str(path), "--seeds", "7"])
    assert config.cells["KD"] == Cell(**{**create_cell("KD", {}).__dict__, "distill_loss_weight": 0.01})
    assert config.seed_range == range(7)
