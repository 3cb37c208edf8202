"""The study end to end in seconds: every cell and seed becomes a row with all that was asked for."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from study_parts import ARMS
from study_runs import rows_of, study_process

import study
from studies import evaluation as study_evaluation
from studies import latencies as study_latencies
from studies.config import StudyConfig
from studies.data import StudyData
from timm_igkd.evaluation.corruptions import CORRUPTIONS
from timm_igkd.models.loading import load_model


def test_every_cell_and_seed_becomes_a_row_seed_by_seed(run_study, settings):
    assert run_study(settings).code == 0
    rows = rows_of(settings)
    assert [(row["cell"], row["seed"]) for row in rows] == [(cell, seed) for seed in "01" for cell in ARMS]
    assert len({row["config_hash"] for row in rows}) == 3
    assert {row["n_test"] for row in rows} == {"8"}
    assert len({row["teacher_hash"] for row in rows} | {""}) == 2
    assert json.loads(rows[0]["settings"])["cell"]["student"] == "test_resnet"


def test_all_evaluations_that_are_asked_for_are_in_the_row(run_study, settings, monkeypatch):
    monkeypatch.setattr(study_latencies, "_SECONDS", 0.0)
    extra = {"corruption_images": 4, "ig_images": 2, "transfer_dataset": settings["dataset"], "latency": True}
    assert run_study(settings | extra | {"seeds": 1, "cells": {"KD": ARMS["KD"]}}).code == 0
    (row,) = rows_of(settings)
    assert {name for name, value in row.items() if value == ""} == {"diverged_epoch"}
    kinds = [float(row[f"corruption/{kind}/{severity}"]) for kind in CORRUPTIONS for severity in range(1, 6)]
    assert float(row["corruption_top1"]) == pytest.approx(np.mean(kinds))
    assert row["corruption_n"] == "4"
    assert row["transfer_top1"] == row["top1"]  # the same images
    assert row["teacher_transfer_top1"] == row["teacher_top1"]
    assert float(row["teacher_macs"]) > 0
    assert float(row["teacher_latency_ms_64"]) > float(row["teacher_latency_ms_1"]) > 0
    assert int(row["latency_threads"]) == torch.get_num_threads()
    assert json.loads(row["transfer_per_class"]).keys() == {"class_0", "class_1"}
    assert -1 <= float(row["ig_correlation"]) <= 1


def test_what_is_not_asked_for_is_empty(run_study, settings):
    assert run_study(settings | {"seeds": 1}).code == 0
    for row in rows_of(settings):
        assert row["corruption_top1"] == row["transfer_top1"] == row["ig_correlation"] == row["latency_ms_1"] == ""


def test_a_study_without_teacher_trains_and_saves_one(run_study, settings):
    cell = {"student": "test_resnet", "protocol": "light", "epochs": 1, "batch_size": 4, "save": True}
    given = settings | {"teacher": None, "base": {}, "cells": {"teacher": cell}, "seeds": 1}
    assert run_study(given).code == 0
    (row,) = rows_of(settings)
    assert row["teacher_hash"] == row["agreement"] == ""
    folder = Path(settings["output_dir"]) / "students" / f"{row['config_hash']}-0"
    model = load_model(f"local-dir:{folder}")
    data = StudyData(StudyConfig(**given), torch.device("cpu"))
    top1 = (
        100 * (study_evaluation.predict(model, data.test.images.images).argmax(1) == data.test.images.labels).double()
    )
    assert abs(float(top1.mean()) - float(row["top1"])) <= 100 / 8  # float16 may turn one of the eight


@pytest.mark.parametrize(
    "cell",
    [
        {"overlay_prob": 0.5, "overlay_source": "random_teacher"},
        {"overlay_prob": 0.5, "overlay_source": "shuffled", "distill_loss_weight": 0.1, "logits": "shuffled"},
        {"overlay_prob": 0.5, "attention_loss_weight": 0.8, "logits": "live"},
        {"distill_loss_weight": 0.5, "logits": "live", "teacher_view": "same", "cutout": 4, "smoothing": 0.1},
        {"model_ema": True, "model_ema_decay": 0.5, "clip_grad": 1.0},
        {"explanation_loss_weight": 1.0, "distill_loss_weight": 0.1, "padding": 2, "padding_mode": "reflect"},
        {"overlay_prob": 0.5, "map_method": "saliency", "explanation_loss_weight": 1.0, "model_ema": True},
        {"student": None, "drop": 1, "distill_loss_weight": 0.1, "subset_fraction": 0.5, "batch_size": 2},
    ],
)
def test_every_kind_of_cell_runs(run_study, settings, cell):
    assert run_study(settings | {"cells": {"cell": cell}, "seeds": 1}).code == 0
    (row,) = rows_of(settings)
    assert (int(row["n_train"]), int(row["n_left_out"])) == ((8, 8) if "subset_fraction" in cell else (16, 0))


def test_images_held_out_for_validation_are_not_counted_as_left_out_of_a_subset(run_study, settings):
    cells = {"cell": {"subset_fraction": 0.5, "batch_size": 2}}
    assert run_study(settings | {"cells": cells, "seeds": 1, "evaluate_on": "validation"}).code == 0
    (row,) = rows_of(settings)
    assert (int(row["n_test"]), int(row["n_train"]), int(row["n_left_out"])) == (2, 8, 6)  # 7 a class, 3.5 rounded to 4


@pytest.mark.slow
def test_commit_can_be_named_where_there_is_no_history(run_study, settings, monkeypatch):
    monkeypatch.setenv("TIMM_IGKD_COMMIT", "abc1234")
    assert run_study(settings | {"seeds": 1}).code == 0
    assert {row["commit"] for row in rows_of(settings)} == {"abc1234"}


@pytest.mark.slow
def test_trackers_get_every_epoch_of_a_study(run_study, settings):
    assert run_study(settings | {"seeds": 1, "trackers": ["tensorboard"]}).code == 0
    assert list(Path(settings["work_dir"]).rglob("events.out.tfevents.*"))


def test_tracker_of_a_study_that_is_not_installed_is_one_line(run_study, settings, monkeypatch):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    outcome = run_study(settings | {"trackers": ["trackio"]})
    assert outcome.code == 2
    assert "trackers not installed: trackio; pip install trackio" in outcome.error


@pytest.mark.slow
def test_a_finished_run_leaves_no_optimizer_behind(settings):
    planned = study.Study(StudyConfig(**settings | {"seeds": 1}))
    planned.run_missing()
    assert planned.accelerator._optimizers == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_runs_learn_what_plain_ones_do(run_study, settings, tmp_path):
    """In a process of its own, where the compiler may write to stderr."""
    one = settings | {"cells": {"KD&IG": ARMS["KD&IG"]}, "seeds": 1}
    assert run_study(one).code == 0
    compiled = one | {"output_dir": str(tmp_path / "compiled")}
    study_process(tmp_path / "compiled.yaml", compiled, "--compile", "default", "--report", "false")
    losses = [float(rows_of(each)[0]["train_loss"]) for each in (one, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_missing_packages_of_the_report_are_named_before_any_run(run_study, settings, monkeypatch):
    monkeypatch.setattr("studies.find_spec", lambda name: None if name == "statsmodels" else object())
    outcome = run_study(settings)
    assert outcome.code == 2
    assert "the study's report needs statsmodels; install it with: pip install 'timm-igkd[study]'" in outcome.error
    assert not Path(settings["output_dir"]).exists()


def test_teacher_of_other_classes_is_refused(run_study, settings, tmp_path):
    from tiny_parts import tiny_teacher

    from timm_igkd.models.loading import save_model

    save_model(tiny_teacher(classes=3, size=16), tmp_path / "three")
    outcome = run_study(settings | {"teacher": f"local-dir:{tmp_path / 'three'}"})
    assert outcome.code == 2
    assert not Path(settings["output_dir"], "results.csv").exists()


def test_several_processes_of_the_launcher_are_refused(run_study, settings, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.num_processes", property(lambda self: 2))
    outcome = run_study(settings)
    assert outcome.code == 2
    assert "--num_processes 1 and give --parallel N" in outcome.error
