"""A stage is known by what it read: other images, labels, models or maps are refused, never used or kept in silence."""

import io
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
from command_lines import Runner, tiny_run, two_splits

from timm_igkd import distill, load_labeled_images
from timm_igkd.data.labels import stratified_limit
from timm_igkd.files import exclusive
from timm_igkd.runs.folder import RunFolder, RunInputs
from timm_igkd.runs.job import Run
from timm_igkd.runs.settings import RunConfig


@pytest.fixture
def finished(recipe: Runner, tiny_images, teacher_folder, tmp_path):
    """Run once to the end; return the images, the run's folder and the options."""
    images = two_splits(tiny_images)
    options = ["--teacher", f"local-dir:{teacher_folder}", "--teacher-epochs", 0, "--overlay-prob", 0.5]
    assert recipe(*tiny_run(images, *options)).code == 0
    return images, tmp_path / "runs" / "run", options


def rewrite(images: Path, split: str, change) -> None:
    """Rewrite a split's rows by `change(rows)`, a list of {"image", "label"}."""
    (path,) = images.glob(f"{split}-*.parquet")
    table = datasets.Dataset.from_parquet(str(path), cache_dir=str(images / "cache"))
    rows = [dict(row) for row in table]
    change(rows)
    columns = {name: [row[name] for row in rows] for name in table.column_names}
    datasets.Dataset.from_dict(columns, features=table.features).to_parquet(str(path))
    shutil.rmtree(images / "cache")


def one_pixel(rows) -> None:
    rows[3]["image"].putpixel((0, 0), (1, 2, 3))


def flipped_labels(rows) -> None:
    for row in rows:
        row["label"] = 1 - row["label"]


def change_weights(file: Path) -> None:
    tensors = safetensors.torch.load_file(file)
    name = next(name for name in tensors if tensors[name].is_floating_point())
    tensors[name] += 0.01
    safetensors.torch.save_file(tensors, file)


def permute_maps(run: Path) -> None:
    path = sorted((run / "maps" / "data").glob("*.parquet"))[0]
    table = pq.read_table(path)
    order = np.roll(np.arange(table.num_rows), 1)
    columns = [table.column(name).take(order) if name != "key" else table.column(name) for name in table.column_names]
    pq.write_table(table.from_arrays(columns, schema=table.schema), path)


def test_the_same_command_again_is_nothing_to_do(finished, recipe):
    images, run, options = finished
    before = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    assert recipe(*tiny_run(images, *options)).code == 0
    assert {path: path.read_bytes() for path in run.rglob("*.safetensors")} == before


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda images, run, teacher: rewrite(images, "train", one_pixel), "training images"),
        (lambda images, run, teacher: rewrite(images, "train", flipped_labels), "training images"),
        (lambda images, run, teacher: rewrite(images, "test", one_pixel), "test images"),
        (lambda images, run, teacher: rewrite(images, "test", flipped_labels), "test images"),
        (lambda images, run, teacher: change_weights(teacher / "model.safetensors"), "teacher's files"),
        (lambda images, run, teacher: change_weights(run / "teacher" / "model.safetensors"), "teacher"),
        (lambda images, run, teacher: change_weights(run / "student" / "model.safetensors"), "student"),
        (lambda images, run, teacher: permute_maps(run), "maps"),
    ],
    ids=["pixel", "labels", "test pixel", "test labels", "teacher's source", "teacher", "student", "maps"],
)
def test_changed_input_of_a_finished_run_is_refused(change, what, finished, recipe, teacher_folder):
    images, run, options = finished
    metrics = (run / "metrics.json").read_bytes()
    change(images, run, teacher_folder)
    outcome = recipe(*tiny_run(images, *options))
    assert outcome.code == 2
    assert f"was made with other {what} than are there now" in outcome.error
    assert (run / "metrics.json").read_bytes() == metrics


@pytest.mark.parametrize("change", [one_pixel, flipped_labels])
def test_changed_images_between_kill_and_resume_are_refused(change, recipe, tiny_images, tmp_path, monkeypatch):
    from timm_igkd.training.trainer import Trainer

    images = two_splits(tiny_images)
    options = ["--epochs", 3, "--overlay-prob", 0]
    save = Trainer.save_checkpoint

    def stop(self):
        save(self)
        if self.label == "student":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "save_checkpoint", stop)
        assert recipe(*tiny_run(images, *options)).code == 130
    rewrite(images, "train", change)
    outcome = recipe(*tiny_run(images, *options, "--resume"))
    assert outcome.code == 2
    assert "was made with other training images" in outcome.error


# ---- all splits are checked before the first stage, and count the same classes ----


def names_of(images: Path, split: str, names: list[str]) -> None:
    """Give a split's classes other names, in another order."""
    (path,) = images.glob(f"{split}-*.parquet")
    table = datasets.Dataset.from_parquet(str(path), cache_dir=str(images / "cache"))
    features = table.features.copy()
    features["label"] = datasets.ClassLabel(names=names)
    columns = {name: table[name] for name in table.column_names}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))
    shutil.rmtree(images / "cache")


def renamed(images: Path, *names: str) -> None:
    for split in ("train", "test"):
        names_of(images, split, list(names))


@pytest.mark.parametrize("names", [("class_1", "class_0"), ("class_0", "horse")])
def test_other_class_names_of_the_same_images_are_refused(names, finished, recipe):
    images, run, options = finished
    renamed(images, *names)
    outcome = recipe(*tiny_run(images, *options, "--compare"))
    assert outcome.code == 2
    assert "stage teacher" in outcome.error
    assert "was made with other class names than are there now" in outcome.error
    assert not (run / "arms").exists()


def test_run_from_before_class_names_were_written_down_goes_on(finished, recipe):
    images, run, options = finished
    for marker in (run / ".stages").glob("*.json"):
        content = json.loads(marker.read_text())
        assert ("class names" in content["inputs"]) == (marker.stem not in ("export", "report"))
        content["inputs"].pop("class names", None)
        marker.write_text(json.dumps(content))
    assert recipe(*tiny_run(images, *options)).code == 0


def test_other_files_in_a_models_folder_are_none_of_a_runs_inputs(finished, recipe, teacher_folder):
    images, _, options = finished
    for name in (".DS_Store", "._model.safetensors", "model.onnx", "export.json", "README.md"):
        (teacher_folder / name).write_bytes(b"x")
    assert recipe(*tiny_run(images, *options)).code == 0


def test_test_split_of_another_class_order_scores_the_same(recipe, tiny_images, tmp_path):
    images = two_splits(tiny_images)
    assert recipe(*tiny_run(images, "--epochs", 2)).code == 0
    expected = (tmp_path / "runs" / "run" / "predictions.npz").read_bytes()
    shutil.rmtree(tmp_path / "runs")
    rewrite(images, "test", flipped_labels)
    names_of(images, "test", ["class_1", "class_0"])
    assert recipe(*tiny_run(images, "--epochs", 2)).code == 0
    found = np.load(tmp_path / "runs" / "run" / "predictions.npz")
    assert np.array_equal(found["labels"], np.load(io.BytesIO(expected))["labels"])


@pytest.mark.parametrize("split", ["test", "validation"])
def test_class_that_training_lacks_ends_the_run_before_the_first_stage(split, recipe, tiny_images, tmp_path):
    images = two_splits(tiny_images)
    tiny_images(n=6, split=split, classes=3)
    options = ["--validation-split", "validation"] if split == "validation" else []
    outcome = recipe(*tiny_run(images, *options))
    assert outcome.code == 2
    assert "class 'class_2'" in outcome.error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("split", ["test", "validation"])
def test_wrong_split_ends_the_run_before_the_first_stage(split, recipe, tiny_images, tmp_path):
    images = two_splits(tiny_images)
    outcome = recipe(*tiny_run(images, f"--{split}-split", "tset"))
    assert outcome.code == 2
    assert "tset" in outcome.error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("label", [None, -1])
def test_label_that_is_none_ends_the_run_before_the_first_stage(label, split, recipe, tiny_images, tmp_path):
    images = two_splits(tiny_images)
    rewrite(images, split, lambda rows: rows[5].update(label=label))
    outcome = recipe(*tiny_run(images))
    assert outcome.code == 2
    assert "image 5 " in outcome.error
    assert not (tmp_path / "runs").exists()


# ---- a limit keeps every class ----


def test_limit_keeps_the_share_of_every_class():
    labels = np.repeat(np.arange(10), 30)
    kept = stratified_limit(labels, 100, seed=0)
    assert np.bincount(labels[kept]).tolist() == [10] * 10
    assert len(set(kept)) == 100
    assert (np.diff(kept) > 0).all()
    assert not np.array_equal(kept, stratified_limit(labels, 100, seed=1))
    assert np.array_equal(stratified_limit(labels, 400, seed=0), np.arange(300))
    uneven = np.array([0] * 90 + [1] * 10)
    assert np.bincount(uneven[stratified_limit(uneven, 20, seed=0)]).tolist() == [18, 2]


def test_train_limit_of_class_folders_keeps_all_classes(recipe, tiny_images, tmp_path):
    tiny_images("folder", n=8, split="test", classes=4)
    images = tiny_images("folder", n=24, split="train", classes=4)
    assert recipe(*tiny_run(images, "--train-limit", 12, "--validation-fraction", 0)).code == 0
    labels = load_labeled_images(str(images), "train").labels
    kept = stratified_limit(labels, 12, seed=0)
    assert np.bincount(labels[kept]).tolist() == [3, 3, 3, 3]


def test_content_hash_sees_pixels_labels_and_order(tiny_images):
    def opened(*kind, **name):
        return load_labeled_images(str(tiny_images(*kind, **name)), "train")

    images = opened()
    assert images.content_hash() == opened().content_hash()
    parts = [images, images.subset([1, 0, 2]), images.subset([0, 1, 2]), images.subset([0, 1])]
    assert len({part.content_hash() for part in parts}) == 4
    folders = opened("folder", name="folders")
    assert folders.content_hash() == opened("folder", name="folders").content_hash() != images.content_hash()


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_checkpoint_that_a_model_starts_from_is_one_of_its_inputs(role, tmp_path):
    def inputs(content: bytes) -> dict[str, str]:
        file = tmp_path / "weights.safetensors"
        file.write_bytes(content)
        settings = {role: "test_resnet", f"{role}_checkpoint": str(file), f"{role}_init": "pretrained"}
        config = RunConfig(teacher_epochs=1, **settings)
        return RunInputs(config, None, RunFolder(tmp_path))._start(role)  # type: ignore[arg-type]

    assert inputs(b"one") != inputs(b"two") != {}


def test_a_run_that_another_process_is_at_work_on_is_left_alone(finished, recipe: Runner):
    images, run, options = finished
    (run / ".stages" / "report.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    with exclusive(run / ".lock"):
        outcome = recipe(*tiny_run(images, *options))
    assert outcome.code == 2
    assert "another process is at work on" in outcome.error
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert recipe(*tiny_run(images, *options)).code == 0


def test_a_training_of_another_process_is_not_called_left_over(finished, recipe: Runner):
    images, run, options = finished
    (run / ".stages" / "student.json").unlink()
    (run / "student_training").mkdir()
    (run / "student_training" / "last.pt").write_bytes(b"")
    with exclusive(run / ".lock"):
        outcome = recipe(*tiny_run(images, *options))
    assert outcome.code == 2
    assert "another process is at work on" in outcome.error
    assert "was stopped half-way; add --resume" in recipe(*tiny_run(images, *options)).error


def test_what_another_process_finished_meanwhile_is_not_removed(
    tiny_images, teacher_folder, tmp_path, recipe: Runner, monkeypatch
):
    """It came through all stages while this one still looked at models."""
    command = tiny_run(two_splits(tiny_images), "--teacher", f"local-dir:{teacher_folder}", "--teacher-epochs", 0)
    look = Run._check_models

    def look_for_long(self: Run, pending) -> None:
        look(self, pending)
        monkeypatch.setattr(Run, "_check_models", look)
        distill(self.config)

    monkeypatch.setattr(Run, "_check_models", look_for_long)
    assert recipe(*command).code == 0
    assert (tmp_path / "runs" / "run" / "student" / "model.safetensors").exists()
    assert recipe(*command).code == 0
