"""--unlabeled, and a training split without labels: the teacher's answers teach what labels cannot."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from command_lines import Runner, tiny_run, two_splits
from tiny_parts import noise_image, tiny_teacher

from timm_igkd import IGDistillationTask, MapStore, load_model
from timm_igkd.data.labels import UNLABELED
from timm_igkd.errors import InputError
from timm_igkd.report.card import model_card
from timm_igkd.report.run_facts import read_run
from timm_igkd.runs.batches import create_batches
from timm_igkd.runs.data import RunData
from timm_igkd.runs.settings import RunConfig


@pytest.fixture
def images(tiny_images) -> Path:
    return two_splits(tiny_images)


@pytest.fixture
def more(tmp_path) -> Path:
    """Return a folder of 8 images without labels, half of them in a folder of their own."""
    for seed in range(8):
        path = tmp_path / "more" / ("deep" if seed % 2 else ".") / f"{seed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(seed).save(path)
    return tmp_path / "more"


@pytest.fixture
def options(teacher_folder, more) -> list[object]:
    teacher = ["--teacher-epochs", 0, "--teacher", f"local-dir:{teacher_folder}"]
    return [*teacher, "--overlay-prob", 0, "--distill-loss-weight", 0.5, "--unlabeled", more]


def history(run: Path, name: str = "student") -> list[dict[str, str]]:
    return list(csv.DictReader((run / f"{name}_history.csv").read_text().splitlines()))


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "runs" / "run"


@pytest.mark.parametrize("road", ["workers", "device"])
def test_student_learns_from_both_parts_and_the_page_counts_them(road, recipe: Runner, images, options, run):
    outcome = recipe(*tiny_run(images, *options, "--batches", road))
    assert outcome.code == 0, outcome.error
    counts = json.loads((run / "metrics.json").read_text())["training_images"]
    assert counts == {"labeled": 12, "unlabeled": 8}
    assert "12 labelled and 8 unlabelled images" in (run / "report" / "index.html").read_text()
    card = model_card(load_model(f"local-dir:{run / 'student'}"), "user/x", read_run(run))
    assert "it learnt from 12 labelled and 8 unlabelled images, those without labels by the teacher's answers" in card


def test_both_makers_mix_the_parts_alike(images, more):
    config = RunConfig(protocol="demo", dataset=str(images), validation_split=None, validation_fraction=0.25)
    config = replace(config, unlabeled=str(more), train_crop="none", overlay_prob=0.0, batch_size=4)
    task = IGDistillationTask(tiny_teacher(size=16), distill_loss_weight=0, verbose=False)
    found = []
    for road in ("workers", "device"):
        batches = create_batches(
            replace(config, batches=road), RunData(config), task, None, Accelerator(cpu=True), with_unlabeled=True
        )
        found.append(list(batches.epoch(0)))
    labels = torch.stack([batch.labels for batch in found[0]])
    assert len(labels) == 5
    assert int((labels == UNLABELED).sum()) == 8
    assert any(0 < int((row == UNLABELED).sum()) < 4 for row in labels)
    for first, second in zip(*found, strict=True):
        assert torch.equal(first.labels, second.labels)
        assert torch.allclose(first.student, second.student, atol=1e-6)


@pytest.mark.parametrize("road", ["workers", "device"])
def test_stored_logits_and_overlays_cover_both_parts(road, recipe: Runner, images, options, run):
    both = ["--stored-logits", "--overlay-prob", 0.5, "--map-target", "predicted", "--batches", road]
    outcome = recipe(*tiny_run(images, *options, *both))
    assert outcome.code == 0, outcome.error
    labels = MapStore(run / "maps").rows["label"][:]
    assert (len(labels), list(labels[16:])) == (24, [UNLABELED] * 8)


def test_teacher_is_trained_on_the_labelled_images_alone(recipe: Runner, images, options, tmp_path, monkeypatch):
    monkeypatch.setattr("timm_igkd.runs.job.write_report", lambda *args, **kwargs: None)
    trained = ["--teacher", "test_resnet", "--teacher-epochs", 1, "--overlay-prob", 0, "--distill-loss-weight", 0.5]
    for name, unlabeled in {"with": options[-2:], "without": []}.items():
        assert recipe(*tiny_run(images, *trained, *unlabeled, "--name", name)).code == 0
    found = [
        safetensors.torch.load_file(tmp_path / "runs" / name / "teacher" / "model.safetensors")
        for name in ("with", "without")
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_other_unlabelled_images_are_refused_by_a_finished_student(recipe: Runner, images, options, more):
    assert recipe(*tiny_run(images, *options)).code == 0
    noise_image(99).save(more / "0.png")
    outcome = recipe(*tiny_run(images, *options))
    assert outcome.code == 2
    assert "stage student of" in outcome.error
    assert "made with other unlabelled images" in outcome.error


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_images_of_the_test_split_are_not_learnt_from_without_their_labels(kind, tiny_images, more):
    for split, n in (("test", 8), ("train", 16)):
        images = tiny_images(kind, n=n, split=split)
    config = RunConfig(protocol="demo", dataset=str(images), validation_split=None, validation_fraction=0.25)
    config = replace(config, overlay_prob=0.0)
    again = [(str(images), "test"), *([(str(images / "test"), None)] if kind == "folder" else [])]
    for unlabeled, split in again:
        data = RunData(replace(config, unlabeled=unlabeled, unlabeled_split=split))
        with pytest.raises(InputError, match="8 of the 8 images of test_split 'test' are also in unlabeled"):
            data.check_images(mapped_first=False)
    RunData(replace(config, unlabeled=str(more))).check_images(mapped_first=False)
    data = RunData(replace(config, unlabeled=str(more)))
    (more / "copied.png").write_bytes(next(data.test._files())[0])
    with pytest.raises(InputError, match="1 of the 8 images"):
        RunData(replace(config, unlabeled=str(more))).check_images(mapped_first=False)


@pytest.mark.slow
def test_student_alone_in_a_comparison_has_the_labelled_images_only(recipe: Runner, images, options, run):
    outcome = recipe(*tiny_run(images, *options, "--compare", "--epochs", 3))
    assert outcome.code == 0, outcome.error
    settings = json.loads((run / "arms" / "alone-0" / ".stages" / "student.json").read_text())["settings"]
    assert settings["unlabeled"] is None
    assert len(history(run)) == 3  # of 5 steps: 12 images with labels and 8 without in batches of 4
    assert settings["epochs"] == len(history(run / "arms" / "alone-0")) == 5  # of 3 steps
    page = (run / "report" / "index.html").read_text()
    assert "and number of steps (the student alone has the labelled images only, and more epochs of them)" in page
    assert "Measured on all 8 images of split" in page
    assert recipe(*tiny_run(images, *options, "--compare", "--epochs", 3)).code == 0  # all is complete
    assert "training_images" not in json.loads((run / "arms" / "alone-0" / "metrics.json").read_text())


def test_training_split_without_labels_is_distilled_on_the_classes_of_the_test_split(
    recipe: Runner, tiny_images, options, more, run
):
    images = tiny_images("folder", n=8, split="test")
    more.rename(images / "train")
    outcome = recipe(*tiny_run(images, *options[:-2]))
    assert outcome.code == 0, outcome.error
    (epoch,) = history(run)
    assert (epoch["task_loss"], epoch["top1_train"], epoch["val_top1"]) == ("", "", "")
    assert float(epoch["distill_loss"]) > 0
    assert json.loads((run / "metrics.json").read_text())["training_images"] == {"labeled": 0, "unlabeled": 8}


def test_teacher_cannot_be_trained_on_a_split_without_labels(recipe: Runner, tiny_images, options, more, run):
    images = tiny_images("folder", n=8, split="test")
    more.rename(images / "train")
    outcome = recipe(*tiny_run(images, *options[:-2], "--teacher", "test_resnet", "--teacher-epochs", 1))
    assert outcome.code == 2
    assert re.search("has no labels to train a teacher on; set teacher_epochs to 0", outcome.error)
    assert not run.exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--distill-loss-weight", 0], "by the distillation loss alone, whose weight is 0"),
        (["--mixup", 0.2], "Mixup and CutMix mix labels"),
        (["--cutmix", 1], "Mixup and CutMix mix labels"),
        (["--loss-type", "dkd"], "dkd needs the label of every image"),
        (["--overlay-prob", 0.5], "set map_target to predicted"),
        (["--unlabeled", "absent/in/here"], "does not exist"),
        (["--unlabeled", "empty"], "holds no images"),
        (["--unlabeled", "none", "--unlabeled-split", "train"], "unlabeled_split train is of no images"),
    ],
)
def test_what_does_not_go_with_unlabelled_images_leaves_no_folder(
    changed, message, recipe: Runner, images, options, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    outcome = recipe(*tiny_run(images, *options, *changed))
    assert outcome.code == 2
    assert message in outcome.error
    assert not (tmp_path / "runs").exists()


def test_stored_logits_alone_need_no_label(recipe: Runner, images, options, tmp_path):
    outcome = recipe(*tiny_run(images, *options, "--overlay-prob", 0, "--stored-logits"))
    assert outcome.code == 0, outcome.error
    store = MapStore(tmp_path / "runs" / "run" / "maps")
    assert (len(store), store.provenance.options.method) == (24, "none")


def test_maps_of_the_labelled_part_alone_are_refused(recipe: Runner, images, options, tmp_path):
    stored = ["--stored-logits", "--map-target", "predicted"]
    assert recipe(*tiny_run(images, *options[:-2], *stored, "--name", "labelled")).code == 0
    outcome = recipe(*tiny_run(images, *options, *stored, "--maps", tmp_path / "runs" / "labelled" / "maps"))
    assert outcome.code == 2
    assert "are of 16 images, split 'train' and" in outcome.error
    assert "give 24 to this run" in outcome.error
