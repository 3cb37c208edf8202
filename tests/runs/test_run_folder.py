"""A run's folder: what it lost is made again or named."""

import json
import shutil
from pathlib import Path

import pytest
from command_lines import Runner, tiny_run, two_splits
from recipe_parts import snapshot
from tiny_parts import tiny_teacher

from timm_igkd import IGDistillationTask, load_labeled_images
from timm_igkd.errors import InputError
from timm_igkd.runs.folder import RunFolder
from timm_igkd.runs.models import check_processes
from timm_igkd.runs.settings import RunConfig


@pytest.fixture
def command(tiny_images, teacher_folder) -> list[object]:
    """Return the options of a run of a few seconds, without maps and with a given teacher."""
    images = two_splits(tiny_images)
    options = ["--teacher", f"local-dir:{teacher_folder}", "--teacher-epochs", 0, "--student", "test_resnet"]
    return tiny_run(images, *options, "--student-init", "random", "--overlay-prob", 0)


@pytest.fixture
def run(tmp_path):
    return tmp_path / "runs" / "run"


@pytest.fixture
def finished(recipe: Runner, command, run):
    assert recipe(*command).code == 0
    return run


def test_lost_outputs_of_stages_that_take_seconds_are_made_again(finished, recipe: Runner, command):
    metrics = json.loads((finished / "metrics.json").read_text())
    for lost in ("report/index.html", "predictions.npz", "metrics.json"):
        (finished / lost).unlink()
        outcome = recipe(*command)
        assert outcome.code == 0, outcome.error
        assert (finished / lost).exists()
        assert "report: done" in outcome.output  # it adds to metrics.json
        assert "student: complete, skipped" in outcome.output
    found = json.loads((finished / "metrics.json").read_text())
    assert set(found) == set(metrics)
    assert set(found["wall_time_s"]) == set(metrics["wall_time_s"])
    assert found["top1"] == metrics["top1"]


def test_lost_outputs_of_a_training_are_refused_by_name(finished, recipe: Runner, command):
    for stage, lost in (
        ("student", "student_history.csv"),
        ("student", "student/config.json"),
        ("teacher", "teacher/model.safetensors"),
    ):
        content = (finished / lost).read_bytes()
        (finished / lost).unlink()
        outcome = recipe(*command)
        assert outcome.code == 2
        assert f"stage {stage} of {finished} is complete, but '{finished / lost}' of it is gone" in outcome.error
        assert "choose another --name, or delete the folder" in outcome.error
        (finished / lost).write_bytes(content)
    assert recipe(*command).code == 0


def test_lost_provenance_of_maps_is_made_again(recipe: Runner, command, run, monkeypatch):
    command = [*command, "--overlay-prob", 0.5]
    assert recipe(*command).code == 0
    (run / "maps" / "provenance.json").unlink()
    marker = run / ".stages" / "maps.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"wall_time_s": 1800.0}))
    with monkeypatch.context() as patched:

        def stop(*args, **kwargs):
            raise KeyboardInterrupt

        patched.setattr("timm_igkd.runs.data.compute_maps", stop)
        assert recipe(*command).code == 130
    outcome = recipe(*command)
    assert outcome.code == 0, outcome.error
    assert (run / "maps" / "provenance.json").exists()
    assert "student: complete, skipped" in outcome.output
    assert json.loads(marker.read_text())["wall_time_s"] == 1800  # what the maps cost, see --compare cost
    assert json.loads((run / "metrics.json").read_text())["wall_time_s"]["maps"] == 1800


def test_maps_that_were_killed_and_gone_on_with_cost_all_that_they_took(recipe: Runner, command, run):
    command = [*command, "--overlay-prob", 0.5]
    assert recipe(*command).code == 0
    marker = run / ".stages" / "maps.json"
    (run / "maps" / "provenance.json").unlink()
    left = max(path.stat().st_mtime for path in (run / "maps" / "data").iterdir())
    begun = json.loads(marker.read_text()) | {"wall_time_s": None, "begun_at": left - 500, "spent_s": 1000.0}
    marker.write_text(json.dumps(begun))
    assert recipe(*command).code == 0
    found = json.loads(marker.read_text())
    assert found["spent_s"] == pytest.approx(1500, abs=0.1)
    assert 1500 < found["wall_time_s"] < 1600


def test_lost_history_of_a_trained_teacher_is_refused(recipe: Runner, command, run):
    trained = [*command, "--teacher-epochs", 1]
    assert recipe(*trained).code == 0
    (run / "teacher_history.csv").unlink()
    outcome = recipe(*trained)
    assert outcome.code == 2
    assert "stage teacher of " in outcome.error
    assert "teacher_history.csv' of it is gone" in outcome.error


def test_a_page_that_is_drawn_again_leaves_what_the_student_was_trained_with(finished, recipe: Runner, command):
    environment = finished / "environment.json"
    environment.write_text(json.dumps(json.loads(environment.read_text()) | {"cpu": "another", "command": "mine"}))
    (finished / "report" / "index.html").unlink()
    assert recipe(*command).code == 0
    found = json.loads(environment.read_text())
    assert (found["cpu"], found["command"]) == ("another", "mine")


def test_what_a_killed_export_left_goes_away(tmp_path):
    folder = RunFolder(tmp_path)
    for left in (tmp_path / ".export-ab12_d9z.tmp", folder.export / ".export-cd34q_0a.tmp"):
        (left / "export").mkdir(parents=True)
    (folder.export / "notes.txt").write_text("mine")
    folder.remove_unfinished({"export"})
    assert [path.name for path in tmp_path.rglob("*")] == ["export", "notes.txt"]


def test_output_dir_of_an_unknown_user_is_a_folder_of_that_name():
    assert RunConfig(output_dir="~nobody_of_this_name/x").run_dir == Path("~nobody_of_this_name/x/demo")
    assert RunConfig(output_dir="~/x").run_dir == Path.home() / "x" / "demo"


def test_export_is_complete_with_the_files_that_were_asked_for(tmp_path):
    folder = RunFolder(tmp_path)
    assert [path.name for path in folder.exported(("onnx",))] == ["export.json", "model.onnx"]
    assert [path.name for path in folder.exported(("onnx-int8",))] == ["export.json", "model.onnx", "model_int8.onnx"]


def test_the_same_images_by_another_path_are_the_same_data(finished, recipe: Runner, command, monkeypatch, tmp_path):
    """A run is gone on with from another directory; what it read is known by its content."""
    at = command.index("--dataset") + 1
    monkeypatch.chdir(command[at])
    command[at] = "."
    outcome = recipe(*command)
    assert outcome.code == 0, outcome.error
    assert "student: complete, skipped" in outcome.output


def test_a_rate_of_the_students_alone_is_none_of_the_teachers(recipe: Runner, command, run):
    at = command.index("--teacher-epochs") + 1
    command[at] = 1
    rates = ["--teacher-lr", 0.001, "--lr"]
    assert recipe(*command, *rates, 0.01).code == 0
    outcome = recipe(*command, *rates, 0.02)
    assert outcome.code == 2
    assert f"stage student of {run} was run with lr = 0.01, now it is 0.02" in outcome.error
    outcome = recipe(*command, "--teacher-lr", 0.002, "--lr", 0.01)
    assert f"stage teacher of {run} was run with teacher_lr = 0.001" in outcome.error


@pytest.mark.parametrize("name", ["teacher/notes.txt", "student/thesis.tex", "config.yaml", "metrics.json"])
def test_a_folder_of_somebody_else_is_refused_and_left_as_it_is(name, recipe: Runner, command, run):
    (run / name).parent.mkdir(parents=True)
    (run / name).write_text("mine")
    outcome = recipe(*command)
    assert outcome.code == 2
    assert f"{str(run)!r} holds '{name.partition('/')[0]}' but no run; choose another --name" in outcome.error
    assert [path for path in run.rglob("*") if path.is_file()] == [run / name]


def test_the_images_are_no_runs_folder(recipe: Runner, command, tiny_images):
    images = Path(command[command.index("--dataset") + 1])
    before = snapshot(images)
    outcome = recipe(*command, "--output-dir", images.parent, "--name", images.name)
    assert outcome.code == 2
    assert "but no run; choose another --name or --output-dir" in outcome.error
    assert snapshot(images) == before


def test_files_of_others_in_a_runs_folder_stay(recipe: Runner, command, run):
    for name in ("teacher/notes.txt", "student/thesis.tex", "student_training/.DS_Store", ".teacher-drafts/a.txt"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("mine")
    (run / ".stages").mkdir()  # as a run leaves it that is killed at once
    for _ in range(2):
        outcome = recipe(*command)
        assert outcome.code == 0, outcome.error
    mine = [path for path in run.rglob("*") if path.is_file() and path.read_bytes() == b"mine"]
    assert len(mine) == 4


def test_batches_of_one_image_are_refused_where_a_batch_norm_sees_one_value(recipe: Runner, command, run):
    outcome = recipe(*command, "--batch-size", 1)
    assert outcome.code == 2
    assert "the student cannot train on batches of one image (Expected more than 1 value per channel" in outcome.error
    assert not run.exists()


def test_several_processes_need_a_gradient_of_the_head():
    student, teacher = tiny_teacher(size=16), tiny_teacher(size=16, seed=1)
    for alone in ("attention_loss_weight", "explanation_loss_weight"):
        weights = {"task_loss_weight": 0.0, "distill_loss_weight": 0.0, alone: 1.0}
        task = IGDistillationTask(student, teacher, verbose=False, **weights)
        check_processes(task, 1)
        with pytest.raises(InputError, match="alone leave the student's head, or its bias, without a gradient"):
            check_processes(task, 2)
        task.distill_loss_weight = 0.1
        check_processes(task, 2)


def test_a_run_among_the_images_is_refused(recipe: Runner, command, tiny_images, tmp_path):
    images = tiny_images("folder", n=8) / "train"
    test = tiny_images("folder", n=4, split="test") / "test"
    shutil.copytree(test, tmp_path / "all" / "test")
    shutil.copytree(images, tmp_path / "all" / "train")
    shutil.copytree(tiny_images("folder", n=4, split="dev") / "dev", tmp_path / "all" / "dev")
    options = [*command, "--dataset", tmp_path / "all", "--validation-split", "dev"]
    for split in ("train", "dev", "test"):
        outcome = recipe(*options, "--output-dir", tmp_path / "all" / split / "runs")
        assert outcome.code == 2
        assert "lies among the images of" in outcome.error
        assert "choose another --output-dir" in outcome.error
        assert not (tmp_path / "all" / split / "runs").exists()
    outcome = recipe(*options, "--output-dir", tmp_path / "all" / "runs")
    assert outcome.code == 0, outcome.error
    assert len(load_labeled_images(str(tmp_path / "all"), "train")) == 8
