"""Studies and runs of seconds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_lines import Outcome, Runner, leave_empty_page, run_in_process, tiny_run, two_splits
from fixture_parts import ImageFactory
from study_parts import ARMS, STUDENT, helpful_study

import study
from timm_igkd.runs import job


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
def run_study(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Return `run_study(settings, *flags)`: the study in process, its page left out."""
    monkeypatch.setattr(study, "write_page", lambda config: None)

    def run_study(settings: dict[str, Any], *flags: object) -> Outcome:
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        return run_in_process(study.main, ["--config", path, *flags], capsys)

    return run_study


@pytest.fixture
def images(tiny_images: ImageFactory) -> Path:
    """Return a folder of 16 training and 8 test images in 2 classes."""
    return two_splits(tiny_images)


@pytest.fixture
def run(recipe: Runner, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return `run(*flags, name="run") -> folder`: the recipe on `images` succeeds; `report=True` draws the page."""

    def run(*options: object, name: str = "run", report: bool = False) -> Path:
        if not report:
            monkeypatch.setattr(job, "write_report", leave_empty_page)
        outcome = recipe(*tiny_run(images, *options, "--name", name))
        assert outcome.code == 0, outcome.error
        return tmp_path / "runs" / name

    return run


@pytest.fixture
def trained_teacher(teacher_folder: Path) -> list[object]:
    """Return the flags that use a given teacher, for runs that are about the student."""
    return ["--teacher-epochs", 0, "--teacher", f"local-dir:{teacher_folder}"]


@pytest.fixture(scope="module")
def primary(tmp_path_factory):
    """A complete primary study in which aligned overlays help."""
    return helpful_study(tmp_path_factory.mktemp("primary"))


@pytest.fixture(scope="module")
def helpful(tmp_path_factory):
    """A study in which aligned overlays help; one run is missing, and nothing is claimed."""
    return helpful_study(tmp_path_factory.mktemp("helpful"), skip=[("KD&IG blank", 11)], purpose="exploratory")
