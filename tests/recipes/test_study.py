"""The study end to end in seconds: cells and seeds to rows, skipped, shared, merged; its settings and their errors."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command_lines import RECIPES, Outcome, run_in_process, two_splits
from fixture_parts import ImageFactory
from study_parts import ARMS, STUDENT

import study
from studies import evaluation as study_evaluation
from studies import latencies as study_latencies
from studies.config import StudyConfig
from studies.data import StudyData
from studies.evaluation import map_correlation
from studies.facts import facts
from studies.report import write_report
from studies.results import StudyResults
from studies.rows import StudyRows, key_of
from timm_igkd import MapStore
from timm_igkd.errors import InputError
from timm_igkd.evaluation.corruptions import CORRUPTIONS
from timm_igkd.models.loading import load_model, weights_hash
from timm_igkd.training.trainer import Trainer


@pytest.fixture
def settings(tiny_images: ImageFactory, teacher_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Return the settings of a study of seconds: 16 training and 8 test images of 2 classes, two seeds."""
    return {
        "name": "tiny",
        "dataset": str(two_splits(tiny_images)),
        "teacher": f"local-dir:{teacher_folder}",
        "n_steps": 2,
        "seeds": 2,
        "base": STUDENT,
        "cells": ARMS,
        "latency": False,
        "output_dir": str(tmp_path / "out"),
        "work_dir": str(tmp_path / "work"),
    }


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Return `run(settings, *flags)`: the study in process, its page left out."""
    monkeypatch.setattr(study, "write_page", lambda config: None)

    def run(settings: dict[str, Any], *flags: object) -> Outcome:
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        return run_in_process(study.main, ["--config", path, *flags], capsys)

    return run


class Affine(torch.nn.Module):
    """weight * x + bias, a number per channel."""

    def __init__(self, weight: list[float], bias: list[float]):
        super().__init__()
        self.weight, self.bias = (torch.nn.Parameter(torch.tensor(v).view(1, 3, 1, 1)) for v in (weight, bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x + self.bias


def rows_of(settings: dict[str, Any]) -> list[dict[str, str]]:
    return StudyRows(settings["output_dir"]).read()


def study_process(path: Path, settings: dict[str, Any], *flags: str) -> None:
    """Run the study in a process of its own, to success."""
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    command = [sys.executable, str(RECIPES / "study.py"), "--config", str(path), *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert done.returncode == 0, done.stderr


def without_time(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    timed = ("started", "wall_time_s", "train_images_per_s")
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


# ---- runs ----


def test_every_cell_and_seed_becomes_a_row_seed_by_seed(run, settings):
    assert run(settings).code == 0
    rows = rows_of(settings)
    assert [(row["cell"], row["seed"]) for row in rows] == [(cell, seed) for seed in "01" for cell in ARMS]
    assert len({row["config_hash"] for row in rows}) == 3
    assert {row["n_test"] for row in rows} == {"8"}
    assert len({row["teacher_hash"] for row in rows} | {""}) == 2
    assert json.loads(rows[0]["settings"])["cell"]["student"] == "test_resnet"


@pytest.mark.slow
def test_predictions_beside_the_rows_give_their_accuracy(run, settings):
    assert run(settings).code == 0
    rows = StudyRows(settings["output_dir"])
    labels = rows.labels()
    assert labels.tolist() == [0, 1] * 4
    for row in rows.read():
        hits = rows.predictions(key_of(row)) == labels
        assert 100 * hits.mean() == pytest.approx(float(row["top1"]))


def test_rows_that_are_there_are_skipped_and_lost_ones_repeated(run, settings):
    assert run(settings).code == 0
    path = Path(settings["output_dir"]) / "results.csv"
    lines, before = path.read_text().splitlines(keepends=True), rows_of(settings)
    path.write_text("".join(lines[:3] + lines[4:]))
    assert run(settings).code == 0
    after = rows_of(settings)
    assert after[:2] + after[2:5] == before[:2] + before[3:]
    assert without_time(after[5:]) == without_time(before[2:3])


def test_arms_of_one_seed_start_from_the_same_weights(settings, tmp_path):
    config = StudyConfig(**settings)
    data = StudyData(config, torch.device("cpu"))
    first, same, other = (
        weights_hash(data.create_student(config.cells[cell], seed))
        for cell, seed in [("Student", 0), ("KD&IG", 0), ("KD", 1)]
    )
    assert first == same
    assert first != other


@pytest.mark.slow
def test_a_run_another_process_has_begun_is_left_to_it(run, settings):
    config = StudyConfig(**settings)
    name = f"{config.run_hash(config.cells['KD'])}-0.lock"
    with study.exclusive(Path(settings["work_dir"]) / "runs" / name):
        assert run(settings).code == 0
        assert ("KD", "0") not in [(row["cell"], row["seed"]) for row in rows_of(settings)]
    assert run(settings).code == 0
    assert len(rows_of(settings)) == 6


def test_all_evaluations_that_are_asked_for_are_in_the_row(run, settings, monkeypatch):
    monkeypatch.setattr(study_latencies, "_SECONDS", 0.0)
    extra = {"corruption_images": 4, "ig_images": 2, "transfer_dataset": settings["dataset"], "latency": True}
    assert run(settings | extra | {"seeds": 1, "cells": {"KD": ARMS["KD"]}}).code == 0
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


def test_what_is_not_asked_for_is_empty(run, settings):
    assert run(settings | {"seeds": 1}).code == 0
    for row in rows_of(settings):
        assert row["corruption_top1"] == row["transfer_top1"] == row["ig_correlation"] == row["latency_ms_1"] == ""


def test_a_study_without_teacher_trains_and_saves_one(run, settings):
    cell = {"student": "test_resnet", "protocol": "light", "epochs": 1, "batch_size": 4, "save": True}
    given = settings | {"teacher": None, "base": {}, "cells": {"teacher": cell}, "seeds": 1}
    assert run(given).code == 0
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
def test_every_kind_of_cell_runs(run, settings, cell):
    assert run(settings | {"cells": {"cell": cell}, "seeds": 1}).code == 0
    (row,) = rows_of(settings)
    assert (int(row["n_train"]), int(row["n_left_out"])) == ((8, 8) if "subset_fraction" in cell else (16, 0))


def test_images_held_out_for_validation_are_not_counted_as_left_out_of_a_subset(run, settings):
    cells = {"cell": {"subset_fraction": 0.5, "batch_size": 2}}
    assert run(settings | {"cells": cells, "seeds": 1, "evaluate_on": "validation"}).code == 0
    (row,) = rows_of(settings)
    assert (int(row["n_test"]), int(row["n_train"]), int(row["n_left_out"])) == (2, 8, 6)  # 7 a class, 3.5 rounded to 4


def test_random_teachers_maps_are_not_the_teachers(settings):
    config = StudyConfig(
        **settings
        | {"cells": {name: {"overlay_prob": 0.5, "overlay_source": name} for name in ("aligned", "random_teacher")}}
    )
    data = StudyData(config, torch.device("cpu"))
    data.prepare()
    own, random = (data.training_images(cell, 0).maps for cell in config.cells.values())
    assert not torch.equal(own, random)


def test_cells_of_other_maps_have_a_store_of_their_own_beside(run, settings):
    cells = {name: {"overlay_prob": 0.5, "map_method": name} for name in ("ig", "saliency")}
    cells["KD"] = {"distill_loss_weight": 0.1, "map_method": "saliency"}
    assert run(settings | {"cells": cells, "seeds": 2}).code == 0
    hashes = {row["cell"]: row["maps_hash"] for row in rows_of(settings)}
    assert hashes["ig"] == hashes["KD"] != hashes["saliency"]
    stores = {name: MapStore(Path(settings["work_dir"]) / name) for name in ("maps", "maps_saliency")}
    assert [store.provenance.options.method for store in stores.values()] == ["ig", "saliency"]
    data = StudyData(StudyConfig(**settings | {"cells": cells}), torch.device("cpu"))
    own, other = (data.training_images(data.config.cells[name], 0).maps for name in ("ig", "saliency"))
    assert not torch.equal(own, other)


def test_shuffled_logits_are_those_of_other_images(settings):
    cells = {name: {"distill_loss_weight": 0.1, "logits": name} for name in ("aligned", "shuffled")}
    config = StudyConfig(**settings | {"cells": cells})
    data = StudyData(config, torch.device("cpu"))
    own, other = (data.training_images(cell, 0).logits for cell in config.cells.values())
    assert torch.equal(own.sort(0).values, other.sort(0).values)
    assert not (own == other).all(1).any()


def test_validation_images_are_cut_from_training_and_the_test_split_is_not_read(settings, monkeypatch):
    config = StudyConfig(**settings | {"evaluate_on": "validation", "train_limit": None, "test_split": "no such split"})
    data = StudyData(config, torch.device("cpu"))
    held_out, kept = data.test.images.images, data.training_images(config.cells["Student"], 0).images
    assert len(held_out) + len(kept) == 16
    assert len(held_out) == 2
    assert not any(torch.equal(image, other) for image in held_out for other in kept)


@pytest.mark.slow
def test_rows_of_another_machine_are_merged_once(run, settings, tmp_path):
    assert run(settings | {"seeds": 1}).code == 0
    elsewhere = settings | {"output_dir": str(tmp_path / "elsewhere"), "first_seed": 1, "seeds": 1}
    assert run(elsewhere).code == 0
    outcome = run(settings, "--merge", elsewhere["output_dir"])
    assert outcome.code == 0
    assert "merged 3 runs" in outcome.output
    assert len(rows_of(settings)) == 6
    assert "merged 0 runs" in run(settings, "--merge", elsewhere["output_dir"]).output


def test_rows_of_other_images_are_refused(run, settings, tiny_images, tmp_path):
    assert run(settings | {"seeds": 1}).code == 0
    other = two_splits(tiny_images, seed=5, name="other")
    given = settings | {"dataset": str(other), "work_dir": str(tmp_path / "work2")}
    outcome = run(given)
    assert outcome.code == 2
    assert "holds runs with other images" in outcome.error
    assert not list((tmp_path / "work2" / "runs").glob("*.pt")), "a run was trained before it was refused"


@pytest.mark.slow
def test_rows_that_were_computed_otherwise_are_refused(run, settings):
    """bfloat16 or compiled runs are not paired with others: a study finished by another command would mix them."""
    assert run(settings).code == 0
    rows = StudyRows(settings["output_dir"])
    row = dict(rows.read()[0])
    versions = json.loads(row["versions"])
    assert (versions["precision"], versions["compile"]) == ("no", "none")
    for change in (
        {"device": "cuda"},
        *({"versions": json.dumps(versions | {key: "x"})} for key in ("precision", "compile")),
    ):
        with pytest.raises(InputError, match="must be computed alike"):
            rows.check(row | {"seed": "99"} | change)
        with pytest.raises(InputError, match="must be computed alike"):
            rows.add(row | {"seed": "99"} | change, rows.predictions(key_of(row)), rows.labels())
    old = {key: value for key, value in versions.items() if key != "compile"}  # rows from before it was written
    assert rows.add(row | {"seed": "99", "versions": json.dumps(old)}, rows.predictions(key_of(row)), rows.labels())


@pytest.mark.slow
def test_commit_can_be_named_where_there_is_no_history(run, settings, monkeypatch):
    monkeypatch.setenv("TIMM_IGKD_COMMIT", "abc1234")
    assert run(settings | {"seeds": 1}).code == 0
    assert {row["commit"] for row in rows_of(settings)} == {"abc1234"}


@pytest.mark.slow
def test_trackers_get_every_epoch_of_a_study(run, settings):
    assert run(settings | {"seeds": 1, "trackers": ["tensorboard"]}).code == 0
    assert list(Path(settings["work_dir"]).rglob("events.out.tfevents.*"))


def test_tracker_of_a_study_that_is_not_installed_is_one_line(run, settings, monkeypatch):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    outcome = run(settings | {"trackers": ["trackio"]})
    assert outcome.code == 2
    assert "trackers not installed: trackio; pip install trackio" in outcome.error


@pytest.mark.slow
def test_a_finished_run_leaves_no_optimizer_behind(settings):
    planned = study.Study(StudyConfig(**settings | {"seeds": 1}))
    planned.run_missing()
    assert planned.accelerator._optimizers == []


@pytest.mark.slow
def test_parallel_processes_give_the_rows_of_one(run, settings, tmp_path):
    assert run(settings).code == 0
    expected = {key_of(row): row for row in without_time(rows_of(settings))}
    parallel = settings | {"output_dir": str(tmp_path / "parallel")}
    study_process(tmp_path / "parallel.yaml", parallel, "--parallel", "2")
    found = {key_of(row): row for row in without_time(rows_of(parallel))}
    assert found.keys() == expected.keys()
    for key, row in found.items():
        assert row["top1"] == expected[key]["top1"]
    assert (tmp_path / "parallel" / "index.html").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_runs_learn_what_plain_ones_do(run, settings, tmp_path):
    """In a process of its own, where the compiler may write to stderr."""
    one = settings | {"cells": {"KD&IG": ARMS["KD&IG"]}, "seeds": 1}
    assert run(one).code == 0
    compiled = one | {"output_dir": str(tmp_path / "compiled")}
    study_process(tmp_path / "compiled.yaml", compiled, "--compile", "default", "--report", "false")
    losses = [float(rows_of(each)[0]["train_loss"]) for each in (one, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.slow
def test_killed_study_goes_on_to_the_same_rows(run, settings, tmp_path):
    settings = settings | {"seeds": 4}
    killed = settings | {"output_dir": str(tmp_path / "killed"), "work_dir": str(tmp_path / "killed_work")}
    path = tmp_path / "killed.yaml"
    path.write_text(yaml.safe_dump(killed, sort_keys=False))
    command = [sys.executable, str(RECIPES / "study.py"), "--config", str(path), "--report=false"]
    rows = StudyRows(killed["output_dir"])
    for _ in range(3):
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        before = len(rows.read())
        while process.poll() is None and len(rows.read()) < before + 2:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert 2 <= len(rows.read()) < 12
    assert run(killed).code == 0
    assert run(settings).code == 0
    assert without_time(rows_of(killed)) == without_time(rows_of(settings))


def test_missing_packages_of_the_report_are_named_before_any_run(run, settings, monkeypatch):
    monkeypatch.setattr("studies.find_spec", lambda name: None if name == "statsmodels" else object())
    outcome = run(settings)
    assert outcome.code == 2
    assert "the study's report needs statsmodels; install it with: pip install 'timm-igkd[study]'" in outcome.error
    assert not Path(settings["output_dir"]).exists()


def test_ig_maps_start_from_the_same_picture_whatever_the_normalisation(settings):
    """A model that undoes another mean and std has the teacher's maps."""
    config = StudyConfig(**settings | {"ig_images": 3})
    data = StudyData(config, torch.device("cpu"))
    evaluator = study_evaluation.RunEvaluator(config, data)
    mean, std = data.teacher.pretrained_cfg["mean"], data.teacher.pretrained_cfg["std"]
    other = torch.nn.Sequential(
        Affine([1 / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)]), data.teacher
    )
    other.pretrained_cfg = data.teacher.pretrained_cfg | {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    metrics, _ = evaluator.evaluate(other, config.cells["Student"])
    assert metrics["ig_correlation"] == pytest.approx(1, abs=1e-5)


def test_teacher_of_other_classes_is_refused(run, settings, tmp_path):
    from tiny_parts import tiny_teacher

    from timm_igkd.models.loading import save_model

    save_model(tiny_teacher(classes=3, size=16), tmp_path / "three")
    outcome = run(settings | {"teacher": f"local-dir:{tmp_path / 'three'}"})
    assert outcome.code == 2
    assert not Path(settings["output_dir"], "results.csv").exists()


def test_several_processes_of_the_launcher_are_refused(run, settings, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.num_processes", property(lambda self: 2))
    outcome = run(settings)
    assert outcome.code == 2
    assert "--num_processes 1 and give --parallel N" in outcome.error


# ---- rows ----


def test_a_run_that_is_there_twice_is_refused(run, settings):
    assert run(settings | {"seeds": 1}).code == 0
    path = Path(settings["output_dir"]) / "results.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[-1]]))
    with pytest.raises(InputError, match="2 times; remove the others"):
        rows_of(settings)


def test_rows_are_plain_csv(run, settings):
    assert run(settings | {"seeds": 1}).code == 0
    with open(Path(settings["output_dir"]) / "results.csv", newline="") as file:
        assert [row["cell"] for row in csv.DictReader(file)] == list(ARMS)


# ---- metrics ----


def test_map_correlation_is_pearsons_and_0_for_constant_maps():
    maps = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    others = torch.stack([2 * maps[0] + 1, torch.rand(4, 5), torch.zeros(4, 5)])
    found = map_correlation(maps, others)
    assert found[0] == pytest.approx(1)
    assert found[1] == pytest.approx(np.corrcoef(maps[1].flatten(), others[1].flatten())[0, 1], abs=1e-6)
    assert found[2] == 0


# ---- runs that stop, runs that diverge ----


def stop_after(monkeypatch, epochs_done: int) -> None:
    """Let every run end by Ctrl-C once so many epochs are in its checkpoint."""
    save = Trainer.save_checkpoint

    def save_and_stop(self):
        save(self)
        if len(self.history) == epochs_done:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "save_checkpoint", save_and_stop)


def test_a_run_that_was_stopped_goes_on_from_its_last_epoch(run, settings, tmp_path, monkeypatch):
    cell = ARMS["KD&IG"] | {"protocol": "fast", "epochs": 4, "batch_size": 4, "student_args": {"drop_rate": 0.5}}
    settings |= {"seeds": 1, "cells": {"KD&IG": cell}}
    whole = settings | {"output_dir": str(tmp_path / "whole"), "work_dir": str(tmp_path / "whole_work")}
    assert run(whole).code == 0
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        assert run(settings).code == 130
    assert rows_of(settings) == []
    (checkpoint,) = (Path(settings["work_dir"]) / "runs").glob("*.pt")
    epochs = []
    train = Trainer.train_epoch
    monkeypatch.setattr(
        Trainer, "train_epoch", lambda self, epoch, bar: epochs.append(epoch) or train(self, epoch, bar)
    )
    assert run(settings).code == 0
    assert epochs == [2, 3]
    assert without_time(rows_of(settings)) == without_time(rows_of(whole))
    assert not checkpoint.exists()


def test_a_run_that_diverges_is_a_row_and_stops_nothing(run, settings, tmp_path):
    wild = ARMS["KD"] | {"opt": "sgd", "lr": 1e30, "epochs": 3}
    settings |= {"seeds": 2, "cells": {"wild": wild, "KD": ARMS["KD"]}, "contrasts": [["wild", "KD"]]}
    outcome = run(settings)
    assert outcome.code == 0
    rows = rows_of(settings)
    assert [row["cell"] for row in rows] == ["wild", "KD"] * 2
    assert all(row["diverged_epoch"] in "012" and row["top1"] == "" for row in rows[::2])
    assert all(row["diverged_epoch"] == "" and row["top1"] for row in rows[1::2])
    assert run(settings).code == 0
    assert len(rows_of(settings)) == 4, "not repeated"
    results = StudyResults.read(StudyConfig(**settings))
    assert results.contrasts("top1")[0].comparison.n == 0
    assert dict(facts(results))["Failed"].startswith(
        "2 of the runs, in no mean and no contrast: wild, seed 0 (diverged in "
    )
    assert not results.missing
    merged = StudyRows(tmp_path / "merged")
    assert merged.merge(settings["output_dir"]) == 4


def test_a_run_whose_last_step_spoils_the_student_is_failed(run, settings, monkeypatch):
    def spoil(trainer):
        model = final_model(trainer)
        next(iter(model.parameters())).data.fill_(float("nan"))
        return model

    final_model = Trainer.final_model
    monkeypatch.setattr(Trainer, "final_model", spoil)
    settings |= {"cells": {"KD": ARMS["KD"]}, "contrasts": [], "seeds": 1}
    assert run(settings).code == 0
    (row,) = rows_of(settings)
    assert (row["diverged_epoch"], row["top1"]) == ("1", "")


def test_page_is_written_with_a_diverged_run(run, settings, tmp_path):
    wild = ARMS["KD"] | {"opt": "sgd", "lr": 1e30}
    settings |= {"cells": {"wild": wild, "KD": ARMS["KD"], "Student": {}}}
    settings |= {"contrasts": [["KD", "Student"], ["wild", "KD"]]}
    assert run(settings).code == 0
    write_report([StudyConfig(**settings)], tmp_path / "RESULTS.md", tmp_path / "index.html")
    assert "(diverged in epoch " in (tmp_path / "RESULTS.md").read_text()
