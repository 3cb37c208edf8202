"""A step is tried before anything is done: what cannot be trained ends a run while it has cost nothing."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from command_lines import Runner, tiny_run, two_splits
from timm.data import resolve_model_data_config
from tiny_parts import tiny_teacher

from timm_igkd import evaluate, load_labeled_images, load_model, save_model
from timm_igkd.errors import InputError
from timm_igkd.models.loading import use_image_size, use_whole_images
from timm_igkd.runs.batches import check_trainable
from timm_igkd.runs.data import RunData
from timm_igkd.runs.folder import RunFolder
from timm_igkd.runs.models import RunModels
from timm_igkd.runs.settings import RunConfig


@pytest.fixture
def images(tiny_images) -> Path:
    return two_splits(tiny_images)


@pytest.mark.parametrize("teacher_epochs", [0, 1])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--opt", "fusedadamw"], "cannot be trained: a step with 2 images ended in .*; choose another .*, opt or img"),
        (
            ["--student", "test_convnext", "--student-init", "random"],
            r"'test_convnext' cannot read images of 16 x 16 pixels .*choose another --img-size than that of these",
        ),
        (
            ["--student", "test_vit", "--student-init", "random", "--img-size", 16, "--attention-loss-weight", 0.8],
            r"features at several positions, got shape \(1, 64, 1, 1\) at entry 3 of student",
        ),
        (["--loss-type", "dkd", "--mixup", 0.2], "dkd needs one class of every image, Mixup and CutMix mix two"),
        (["--loss-type", "dkd", "--cutmix", 1], "dkd needs one class of every image"),
    ],
    ids=["optimiser", "size", "attention", "mixup", "cutmix"],
)
def test_what_cannot_be_trained_is_found_before_anything_is_written(
    options, message, teacher_epochs, images, teacher_folder, recipe: Runner, tmp_path
):
    teacher = ["--teacher-epochs", 1] if teacher_epochs else ["--teacher-epochs", 0, "--teacher"]
    given = [] if teacher_epochs else [f"local-dir:{teacher_folder}"]
    outcome = recipe(*tiny_run(images, *teacher, *given, *options))
    assert outcome.code == 2
    assert len(outcome.error.splitlines()) == 1
    assert re.search(message, outcome.error)
    assert not (tmp_path / "runs").exists()


def test_a_step_is_tried_with_all_that_a_students_batch_holds(images, teacher_folder, recipe: Runner, tmp_path):
    losses = ["--explanation-loss-weight", 1, "--stored-logits", "--overlay-prob", 0.5, "--distill-loss-weight", 0.5]
    teacher = ["--teacher-epochs", 0, "--teacher", f"local-dir:{teacher_folder}"]
    assert recipe(*tiny_run(images, *teacher, *losses)).code == 0


def test_the_step_draws_nothing_of_the_hosts_random_numbers(images, accelerator):
    config = RunConfig(protocol="demo", dataset=str(images), validation_split=None, validation_fraction=0.25)
    data = RunData(config)
    task = RunModels(config, data, RunFolder(config.run_dir)).teacher_task(tiny_teacher(size=16))
    before = {name: weight.clone() for name, weight in task.trainable_module.state_dict().items()}
    state = torch.random.get_rng_state()
    check_trainable(config, data, "teacher", task, accelerator)
    assert torch.equal(torch.random.get_rng_state(), state)
    after = task.trainable_module.state_dict()
    assert any(not torch.equal(after[name], weight) for name, weight in before.items())  # a step was made


@pytest.mark.parametrize("change", ["small images", "whole images", "img_size", "model_args"])
def test_a_model_measured_at_another_view_has_no_view_to_test_at_left(change):
    arguments = {"img_size": 32} if change == "img_size" else {}
    arguments |= {"model_args": {"img_size": 32}} if change == "model_args" else {}
    model = load_model("vit_tiny_patch16_224" if change == "model_args" else "resnet10t", pretrained=False, **arguments)
    assert change == "model_args" or timm.create_model("resnet10t").pretrained_cfg["test_crop_pct"] == 0.95
    if change == "small images":
        use_image_size(model, 32, 32)
    if change == "whole images":
        use_whole_images(model)
    assert resolve_model_data_config(model, use_test_size=True) == resolve_model_data_config(model)


def test_a_model_of_random_weights_that_cannot_read_small_images_keeps_its_size():
    model = tiny_teacher("test_convnext", size=64)
    with pytest.raises(InputError, match=r"cannot read images of 16 x 16 pixels .*--img-size"):
        use_image_size(model, 16, 16)
    assert model.pretrained_cfg["input_size"] == (3, 64, 64)


# ---- what is evaluated is what is trained ----


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--train-crop", "pad"], (1.0, "squash")),
        (["--train-crop", "none"], (1.0, "squash")),
        (["--train-crop", "rrc"], (0.5, "center")),
    ],
    ids=["pad", "none", "rrc"],
)
@pytest.mark.parametrize("is_trained", [True, False], ids=["trained", "given"])
def test_a_model_is_evaluated_on_what_it_was_trained_on(
    options, expected, is_trained, images, tmp_path, recipe: Runner
):
    """After a crop of the whole image on whole images; a teacher that is given keeps its own preprocessing."""
    teacher = tiny_teacher(size=16)
    teacher.pretrained_cfg.update(crop_pct=0.5, test_crop_pct=0.7, test_input_size=(3, 24, 24), crop_mode="center")
    save_model(teacher, tmp_path / "start")
    given = ["--teacher", f"local-dir:{tmp_path / 'start'}", "--teacher-init", "pretrained"]
    done = recipe(*tiny_run(images, *given, "--teacher-epochs", int(is_trained), "--overlay-prob", 0, *options))
    assert done.code == 0, done.error
    folder = tmp_path / "runs" / "run"
    for name in ("teacher", "student"):
        own = json.loads((folder / name / "config.json").read_text())["pretrained_cfg"]
        is_own = name == "teacher" and not is_trained
        assert (own["crop_pct"], own["crop_mode"]) == ((0.5, "center") if is_own else expected)
        if expected == (1.0, "squash") and not is_own:  # timm's scripts, which test at another size, are to agree
            kept = load_model(f"local-dir:{folder / name}")
            assert resolve_model_data_config(kept, use_test_size=True) == resolve_model_data_config(kept)
    student = load_model(f"local-dir:{folder / 'student'}")
    found = evaluate(student, load_labeled_images(str(images), "test"), measure_latency=False).metrics
    assert found["top1"] == json.loads((folder / "metrics.json").read_text())["top1"]
