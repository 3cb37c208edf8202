"""The recipe end to end in seconds: its configurations and its stages. Kills and several processes: test_kill.py."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
from command_lines import RECIPES, Runner, tiny_run
from fixture_parts import ImageFactory
from recipe_parts import history, snapshot

from timm_igkd import evaluate, load_labeled_images
from timm_igkd.data.labels import stratified_limit
from timm_igkd.errors import InputError
from timm_igkd.runs.parsing import parse_config
from timm_igkd.runs.settings import RunConfig

CONFIGS = sorted(set((RECIPES / "configs").glob("*.yaml")) - set((RECIPES / "configs").glob("study_*.yaml")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stored_logits": True, "mixup": 0.2}, "clean, uncropped"),
        ({"stored_logits": True, "cutmix": 0.2}, "clean, uncropped"),
        ({"stored_logits": True, "attention_loss_weight": 0.8}, "clean, uncropped"),
        ({"stored_logits": True, "distill_loss_weight": 0}, "do nothing"),
        ({"cutmix": 1.0, "batch_size": 7}, "even batch_size"),
        ({"engine": "captum", "n_steps": "auto"}, "engine fast"),
        ({"teacher_checkpoint": "x.safetensors"}, "teacher_init random does not use"),
        ({"student_drop": 0}, "at least 1"),
        ({"student_args": {"drop_rate": 0.1}}, "drop it"),
        ({"student": "resnet18", "student_init": "teacher"}, "truncated teacher"),
        ({"name": ".."}, "not a path"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RunConfig(**{"student": None} | options)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_names_its_command(path: Path) -> None:
    config = parse_config(RunConfig, ["--config", str(path)])
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert config.name == path.stem
    assert any(f"--config recipes/configs/{path.name}" in line for line in header)
    assert any("Expected" in line for line in header)
    assert any("wall-clock" in line.lower() for line in header)


def test_there_are_configs() -> None:
    assert {"cifar10_cpu", "imagenet_resnet50_to_resnet18"} <= {path.stem for path in CONFIGS}


def test_demo_leaves_every_file_and_plain_timm_reproduces_the_metrics_of_its_student(
    recipe: Runner, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sizes = "--epochs 1 --teacher-epochs 1 --train-limit 96 --test-limit 60 --batch-size 32 --n-steps 4".split()
    outcome = recipe("--name", "digits", *sizes)
    assert outcome.code == 0, outcome.error
    folder = tmp_path / "runs" / "digits"
    expected = (
        "config.yaml environment.json metrics.json predictions.npz report/index.html student_history.csv "
        "teacher_history.csv maps/manifest.json maps/provenance.json maps/README.md teacher/config.json "
        "teacher/model.safetensors student/config.json student/model.safetensors "
        "arms/alone-0/student/model.safetensors arms/kd-0/student/model.safetensors"
    ).split()
    assert [name for name in expected if not (folder / name).is_file()] == []
    assert not (folder / "student_training").exists()
    assert not list(folder.rglob("*.tmp"))

    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["n"] == 60
    assert metrics["teacher"]["n"] == 60
    assert set(metrics["wall_time_s"]) == {"teacher", "maps", "student", "evaluate", "arms", "report"}
    assert metrics["compression"] >= 4
    assert not metrics["needs_plugin"]
    assert [difference["arm"] for difference in metrics["arms"]["differences"]] == ["kd", "kd_overlay"]
    student = timm.create_model(f"local-dir:{folder / 'student'}", pretrained=True).eval()
    test = load_labeled_images("digits", "test")
    test = test.subset(stratified_limit(test.labels, 60, seed=0))
    assert evaluate(student, test).metrics["top1"] == metrics["top1"]
    assert f"local-dir:{folder / 'student'}" in outcome.output


def test_second_run_skips_every_stage_and_changes_nothing(
    recipe: Runner, images: Path, run: Callable[..., Path]
) -> None:
    before = snapshot(run())
    outcome = recipe(*tiny_run(images))
    assert outcome.code == 0
    assert outcome.output.count("complete, skipped") == 5
    after = snapshot(run())
    assert after == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--seed", 1], "seed = 0"),
        (["--lr", 0.1], "lr = 0.002"),
        (["--n-steps", 3], "stage maps.*n_steps = 2"),
        (["--overlay-prob", 0.5], "stage student.*overlay_prob = 0.1"),
        (["--test-limit", 4], "stage evaluate.*test_limit = None"),
    ],
)
def test_other_settings_in_a_finished_folder_are_refused_and_change_nothing(
    options: list[object], named: str, recipe: Runner, images: Path, finished: Path
) -> None:
    before = snapshot(finished)
    outcome = recipe(*tiny_run(images, *options))
    assert outcome.code == 2
    assert re.search(named, outcome.error)
    assert snapshot(finished) == before


@pytest.fixture
def finished(run: Callable[..., Path]) -> Path:
    return run()


def test_corruptions_are_measured_where_they_are_asked_for(
    run: Callable[..., Path], trained_teacher: list[object]
) -> None:
    metrics = json.loads((run(*trained_teacher, "--corruptions", 2, report=True) / "metrics.json").read_text())
    assert metrics["robustness"]["n"] == metrics["teacher"]["robustness"]["n"] == 2


def test_imagenet_config_runs_two_steps(
    recipe: Runner, tiny_images: ImageFactory, teacher_folder: Path, tmp_path: Path
) -> None:
    for split in ("train", "validation"):
        images = tiny_images(kind="folder", n=4, size=40, split=split)
    path = RECIPES / "configs" / "imagenet_resnet50_to_resnet18.yaml"
    small = "--epochs 1 --batch-size 2 --workers 0 --n-steps 2 --validation-fraction 0 --test-limit 4".split()
    outcome = recipe(
        *["--config", path, *small, "--dataset", images, "--image-column", "none", "--label-column", "none"],
        *["--teacher", f"local-dir:{teacher_folder}", "--revision", "none", "--max-steps-per-epoch", 2],
    )
    assert outcome.code == 0, outcome.error
    folder = tmp_path / "runs" / path.stem
    assert len(history(folder)) == 1
    assert (folder / "report" / "index.html").is_file()
