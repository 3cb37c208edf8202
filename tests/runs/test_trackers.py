"""Accelerate's trackers beside a run: which get its epochs, and what is said where a package is missing."""

import sys
from types import ModuleType

import pytest
from accelerate.utils import LoggerType
from command_lines import tiny_run, two_splits


@pytest.fixture
def package(monkeypatch):
    """Return `package(name) -> calls`: a stand-in for a tracker's package, and what it was called with."""

    def install(name):
        module, calls = ModuleType(name), {"init": [], "log": [], "finish": []}
        module.init = lambda **options: calls["init"].append(options) or module
        module.log = lambda values, step=None: calls["log"].append((step, values))
        module.finish = lambda: calls["finish"].append(True)
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType(name)])
        return calls

    return install


def steps(calls):
    """Return, for each logged epoch, the step and the names of the models' losses."""
    return [(step, *(name for name in values if name.endswith("/loss"))) for step, values in calls["log"]]


def test_tensorboard_writes_files(recipe, tiny_images, tmp_path):
    assert recipe(*tiny_run(two_splits(tiny_images), "--trackers", "tensorboard")).code == 0
    assert list((tmp_path / "runs" / "run" / "trackers" / "run").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("name", ["maps", "student_training"])
def test_tensorboard_writes_into_no_folder_of_a_stage_whatever_the_runs_name(name, recipe, tiny_images):
    options = ["--trackers", "tensorboard", "--name", name, "--overlay-prob", 0.5]
    outcome = recipe(*tiny_run(two_splits(tiny_images), *options))
    assert outcome.code == 0, outcome.error


def test_trackio_gets_every_epoch_of_teacher_and_student(recipe, tiny_images, package):
    calls = package("trackio")
    assert recipe(*tiny_run(two_splits(tiny_images), "--trackers", "trackio")).code == 0
    assert calls["init"] == [{"project": "run"}]
    assert steps(calls) == [(0, "teacher/loss"), (0, "student/loss")]
    assert calls["finish"] == [True]


def test_wandb_is_given_no_step_as_it_drops_one_that_was_there(recipe, tiny_images, package, tmp_path):
    calls = package("wandb")
    assert recipe(*tiny_run(two_splits(tiny_images), "--trackers", "wandb")).code == 0
    assert calls["init"] == [{"project": "run", "dir": str(tmp_path / "runs" / "run")}]
    assert steps(calls) == [(None, "teacher/loss"), (None, "student/loss")]
    assert [values["student/epoch"] for _, values in calls["log"][1:]] == [0]


def test_trackers_that_are_not_installed_are_one_line(recipe, tiny_images, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    outcome = recipe(*tiny_run(two_splits(tiny_images), "--trackers", "wandb", "trackio"))
    assert outcome.code == 2
    assert "trackers not installed: wandb trackio; pip install wandb trackio, or leave them out" in outcome.error
    assert not (tmp_path / "runs" / "run").exists()


def test_missing_matplotlib_is_told_before_anything_trains(recipe, tiny_images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = recipe(*tiny_run(two_splits(tiny_images)))
    assert outcome.code == 2
    assert "the report page needs matplotlib" in outcome.error
    assert not (tmp_path / "runs" / "run").exists()
