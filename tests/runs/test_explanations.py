"""--explanation-loss-weight: what it needs, what it is refused with, and what a run tells of it."""

from dataclasses import replace

import pytest
import torch
from command_lines import Runner, tiny_run, two_splits
from tiny_parts import tiny_teacher

from timm_igkd import IGDistillationTask, MapStore, RunConfig, load_model
from timm_igkd.data.items import read_item
from timm_igkd.errors import InputError
from timm_igkd.maps.build import compute_maps
from timm_igkd.report.card import model_card
from timm_igkd.report.run_facts import read_run
from timm_igkd.runs.batches import create_batches
from timm_igkd.runs.data import RunData
from timm_igkd.runs.students import Arm

E = {"explanation_loss_weight": 1.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixup": 0.2}, "cropped and flipped alone, got mixup 0.2; set mixup to 0"),
        ({"cutmix": 1.0}, "got cutmix 1.0; set cutmix to 0"),
        ({"aa": "rand-m9-mstd0.5"}, "got aa rand-m9-mstd0.5; set aa to none"),
        ({"color_jitter": 0.4, "train_crop": "rrc"}, "got color_jitter 0.4; set color_jitter to 0"),
        ({"reprob": 0.25}, "got reprob 0.25; set reprob to 0"),
        ({"compile": True}, "second derivatives, which torch.compile has none of; drop --compile"),
        ({"map_target": "predicted"}, "explains the label, but map_target is predicted; set map_target to label"),
        ({"unlabeled": "folder", "map_target": "predicted"}, "explains the label|needs the label of every image"),
        ({"explanation_loss_weight": -1}, "explanation_loss_weight must be in"),
        ({"compare": "cost", "overlay_prob": 0.1}, "the arm with KD alone needs them too"),
    ],
)
def test_what_it_cannot_go_with_is_refused_before_anything_starts(settings, message):
    with pytest.raises(InputError, match=message):
        RunConfig(**E | settings)


def test_it_needs_maps_of_its_own_accord():
    config = RunConfig(overlay_prob=0.0, compare=None, **E)
    assert config.needs_maps
    assert not replace(config, explanation_loss_weight=0.0).needs_maps


@pytest.mark.parametrize(
    ("reduction", "joined"), [("abs_sum", "abs_sum"), ("sum", "positive"), ("positive", "positive")]
)
def test_the_students_channels_are_joined_as_the_stores(reduction, joined):
    assert RunConfig(map_reduction=reduction, **E).explanation_channels == joined


def test_the_arm_alone_goes_without_and_the_arm_with_kd_keeps_it():
    config = RunConfig(overlay_prob=0.1, **E)
    assert Arm("alone", 0).settings(config).explanation_loss_weight == 0
    assert Arm("kd", 0).settings(config).explanation_loss_weight == 1


@pytest.mark.parametrize("overlay_prob", [0.0, 1.0])
def test_both_roads_give_each_image_its_own_map(overlay_prob, tiny_images, accelerator, tmp_path):
    """Without draws: equal from workers and from the device, and what the store holds of the image."""
    settings = {"protocol": "demo", "validation_split": None, "validation_fraction": 0.0, "compare": None}
    augmentation = {"train_crop": "none", "overlay_prob": overlay_prob, "batch_size": 4}
    config = RunConfig(dataset=str(two_splits(tiny_images)), **settings, **augmentation, **E)
    data = RunData(config)
    compute_maps(tiny_teacher(size=16), data.mapped, tmp_path / "maps", options=replace(config, n_steps=2).ig_options())
    store = MapStore(tmp_path / "maps")
    task = IGDistillationTask(tiny_teacher(size=16), distill_loss_weight=0, verbose=False)
    found = [
        torch.cat([batch.maps for batch in create_batches(each, data, task, store, accelerator).epoch(0)])
        for each in (replace(config, batches=road) for road in ("workers", "device"))
    ]
    assert torch.equal(*found)
    rows = [store.find(*read_item(data.fitting, index), index, "") for index in range(len(data.fitting))]
    stored = sorted(float(store.levels(row).sum()) for row in rows)
    assert (255 * found[0].sum((1, 2, 3))).sort().values.tolist() == pytest.approx(stored)


def test_a_teacher_is_trained_without_maps(tiny_images, accelerator):
    settings = {"protocol": "demo", "validation_split": None, "validation_fraction": 0.0, "batch_size": 4}
    config = RunConfig(dataset=str(two_splits(tiny_images)), **settings, **E)
    task = IGDistillationTask(tiny_teacher(size=16), distill_loss_weight=0, verbose=False)
    for road in ("workers", "device"):
        batches = create_batches(replace(config, batches=road), RunData(config), task, None, accelerator)
        assert next(batches.epoch(0)).maps is None


def test_history_page_and_card_name_the_term(recipe: Runner, teacher_folder, tiny_images, tmp_path):
    teacher = ["--teacher-epochs", 0, "--teacher", f"local-dir:{teacher_folder}"]
    explained = ["--explanation-loss-weight", 2, "--overlay-prob", 0, "--distill-loss-weight", 0.5]
    outcome = recipe(*tiny_run(two_splits(tiny_images), *teacher, *explained))
    assert outcome.code == 0, outcome.error
    run = tmp_path / "runs" / "run"
    header, row = (line.split(",") for line in (run / "student_history.csv").read_text().splitlines())
    terms = dict(zip(header, row, strict=True))
    weighted = (
        0.5 * float(terms["task_loss"]) + 0.5 * float(terms["distill_loss"]) + 2 * float(terms["explanation_loss"])
    )
    assert float(terms["loss"]) == pytest.approx(weighted)
    page = (run / "report" / "index.html").read_text()
    assert "Explanation loss" in page
    assert "weight 2" in page
    assert "the student’s map input_x_gradient" in page
    card = model_card(load_model(f"local-dir:{run / 'student'}"), "user/name", read_run(run))
    assert "its own maps (`input_x_gradient`) held against integrated-gradients maps of the teacher" in card
    assert "| Weight of the explanation loss | 2 |" in card


@pytest.mark.parametrize("kind", ["input_x_gradient", "grad_cam"])
def test_protocol_fast_trains_a_convnet_on_the_device_with_it(kind, recipe: Runner, tiny_images, tmp_path):
    models = "--teacher convnet_cifar --teacher-args widths=[4,8] --student convnet_cifar --student-args widths=[4,8]"
    trained = f"{models} --teacher-epochs 1 --teacher-init random --student-init random --epochs 2 --lr 0.01"
    explained = f"--explanation-loss-weight 1 --explanation-map {kind} --map-method grad_cam --validation-fraction 0.25"
    fixed = f"--protocol fast --name run --batch-size 4 {trained} {explained}"
    outcome = recipe(*fixed.split(), "--dataset", two_splits(tiny_images, size=32))
    assert outcome.code == 0, outcome.error
    run = tmp_path / "runs" / "run"
    assert "batches: device" in (run / "config.yaml").read_text()
    header, *rows = (line.split(",") for line in (run / "student_history.csv").read_text().splitlines())
    assert all(0 < float(dict(zip(header, row, strict=True))["explanation_loss"]) < 1 for row in rows)


def test_a_student_without_a_map_ends_the_run_before_it_begins(recipe: Runner, teacher_folder, tiny_images, tmp_path):
    teacher = ["--teacher-epochs", 0, "--teacher", f"local-dir:{teacher_folder}"]
    options = ["--explanation-loss-weight", 1, "--explanation-map", "grad_cam"]
    outcome = recipe(*tiny_run(two_splits(tiny_images), *teacher, *options, "--student", "test_resnet"))
    assert outcome.code == 2
    assert "map of a single pixel" in outcome.error
    assert not list((tmp_path / "runs").glob("*"))
