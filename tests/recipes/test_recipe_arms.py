"""The arms of the recipe: each trains and logs its terms alone, on its images, beside its teacher."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixture_parts import ImageFactory
from recipe_parts import equal, history, weights
from torch import Tensor

from timm_igkd import IGDistillationTask, MapStore
from timm_igkd.models.loading import load_model, save_model
from timm_igkd.runs import students
from timm_igkd.runs.parsing import parse_config
from timm_igkd.runs.settings import RunConfig
from timm_igkd.training.history import TERMS

ARMS: dict[str, tuple[str, set[str]]] = {
    "ce": ("--overlay-prob 0 --distill-loss-weight 0", {"task_loss"}),
    "ig": ("--overlay-prob 1 --distill-loss-weight 0", {"task_loss"}),
    "kd": ("--overlay-prob 0 --distill-loss-weight 0.5", {"task_loss", "distill_loss"}),
    "kd_ig": ("--overlay-prob 0.5 --distill-loss-weight 0.5", {"task_loss", "distill_loss"}),
    "clean_view": ("--overlay-prob 0.5 --distill-loss-weight 0.5 --teacher-view clean", {"task_loss", "distill_loss"}),
    "stored": ("--stored-logits --distill-loss-weight 0.5", {"task_loss", "distill_loss"}),
    "stored_without_overlay": ("--stored-logits --overlay-prob 0 --task-loss-weight 0", {"distill_loss"}),
    "at": (
        "--attention-loss-weight 0.8 --distill-loss-weight 0.5",
        {"task_loss", "distill_loss", "attention_loss"},
    ),
    "explained": ("--explanation-loss-weight 1 --overlay-prob 0.5", {"task_loss", "distill_loss", "explanation_loss"}),
    "explained_by_workers": (
        "--explanation-loss-weight 1 --stored-logits --overlay-prob 0 --train-crop rrc --model-ema",
        {"task_loss", "distill_loss", "explanation_loss"},
    ),
    "explained_by_grad_cam": (
        "--explanation-loss-weight 1 --explanation-map grad_cam --student test_vit --hflip 0.5 "
        "--img-size 32 --map-reduction positive",
        {"task_loss", "distill_loss", "explanation_loss"},
    ),
    "dkd": ("--loss-type dkd --overlay-prob 0.5", {"task_loss", "distill_loss"}),
    "mix": ("--mixup 0.2 --cutmix 1 --overlay-prob 0.5 --distill-loss-weight 0.5", {"task_loss", "distill_loss"}),
    "ema": ("--model-ema --model-ema-decay 0.5", {"task_loss", "distill_loss"}),
    "accumulated": ("--grad-accum-steps 2 --clip-grad 1 --sched none", {"task_loss", "distill_loss"}),
    "own_student": ("--student test_vit --student-args img_size=16", {"task_loss", "distill_loss"}),
    "augmented": (
        "--train-crop rrc --hflip 0.5 --aa 3a --color-jitter 0.4 --reprob 0.5 --smoothing 0.1",
        {"task_loss", "distill_loss"},
    ),
    "padded": ("--hflip 0.5 --aa rand-m9-mstd0.5 --reprob 0.5 --opt sgd", {"task_loss", "distill_loss"}),
    "from_teacher": ("--student-init teacher --student-drop 1", {"task_loss", "distill_loss"}),
    "control": ("--overlay-source shuffled --overlay-prob 1", {"task_loss", "distill_loss"}),
}


@pytest.mark.parametrize("arm", ARMS)
def test_arm_trains_and_logs_its_terms_alone(arm: str, run: Callable[..., Path], trained_teacher: list[object]) -> None:
    options, terms = ARMS[arm]
    draws = arm in ("ce", "stored_without_overlay", "control", "explained")  # no maps; without overlay; a control; all
    folder = run(*trained_teacher, *options.split(), name=arm, report=draws)
    (row,) = history(folder)
    terms_logged = {name for name in TERMS if name.endswith("_loss") and row[name] != ""}
    assert terms_logged == terms
    assert np.isfinite(float(row["loss"]))
    assert float(row["val_top1"]) >= 0
    assert bool((folder / "report" / "index.html").read_text()) == draws
    config = parse_config(RunConfig, ["--config", str(folder / "config.yaml")])
    assert (folder / "maps").exists() == config.needs_maps
    if config.stored_logits:
        assert MapStore(folder / "maps").has_logits


def test_ema_is_the_student_that_is_kept(run: Callable[..., Path], trained_teacher: list[object]) -> None:
    options = [*trained_teacher, "--epochs", 2]
    plain = weights(run(*options, name="plain"))
    ema = weights(run(*options, "--model-ema", "--model-ema-decay", 0.9, name="ema"))
    frozen = weights(run(*options, "--model-ema", "--model-ema-decay", 0.0, name="newest"))
    assert not equal(plain, ema)
    assert equal(plain, frozen)


def test_clean_view_reaches_the_teacher_through_mixup(
    run: Callable[..., Path], trained_teacher: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    real = IGDistillationTask.forward

    def forward(self: Any, input: Tensor, target: Tensor, teacher_input: Any = None, **more: Any) -> Any:
        seen.append((input.clone(), teacher_input.clone(), target))
        return real(self, input, target, teacher_input, **more)

    monkeypatch.setattr(IGDistillationTask, "forward", forward)
    options = ["--overlay-prob", 1, "--mixup", 0.5, "--cutmix", 1, "--distill-loss-weight", 0.5]
    options += ["--teacher-view", "clean", "--overlay-weight"]
    run(*trained_teacher, *options, 0.5, name="overlaid")
    overlaid = seen[1:]  # the first is the step that is tried
    assert len(overlaid) == 3
    assert all(target.ndim == 2 and not torch.equal(student, teacher) for student, teacher, target in overlaid)
    seen.clear()
    run(*trained_teacher, *options, 0, name="weightless")  # the overlay leaves the image as it is: both views are one
    assert all(torch.equal(student, teacher) for student, teacher, _ in seen)
    assert all(torch.equal(was[1], now[1]) for was, now in zip(overlaid, seen[1:], strict=True))


def test_validation_is_cut_from_the_training_images_by_class(
    run: Callable[..., Path], trained_teacher: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    real = students.StudentRun.train

    def student(self: students.StudentRun) -> None:
        seen.update(fitting=self.data.fitting, validation=self.data.validation)
        real(self)

    monkeypatch.setattr(students.StudentRun, "train", student)
    run(*trained_teacher, "--overlay-prob", 1, name="cut")
    assert len(seen["fitting"]) == 12
    assert seen["validation"].labels.tolist().count(0) == seen["validation"].labels.tolist().count(1) == 2
    keys = [{image.tobytes() for image, _ in (part.read(i) for i in range(len(part)))} for part in seen.values()]
    assert not keys[0] & keys[1]


def test_teacher_outputs_in_another_order_are_matched_by_name(
    run: Callable[..., Path], tiny_images: ImageFactory, tmp_path: Path, trained_teacher: list[object]
) -> None:
    teacher = load_model(str(trained_teacher[3]))
    classifier: Any = teacher.get_classifier()
    with torch.no_grad():
        classifier.weight.copy_(classifier.weight.flip(0))
        classifier.bias.copy_(classifier.bias.flip(0))
    save_model(teacher, tmp_path / "flipped", label_names=["class_1", "class_0"])
    options = ["--distill-loss-weight", 0.5]
    straight = run(*trained_teacher, *options, name="straight")
    flipped = run("--teacher-epochs", 0, "--teacher", f"local-dir:{tmp_path / 'flipped'}", *options, name="flipped")
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (straight, flipped)]
    assert metrics[0]["teacher"]["top1"] == metrics[1]["teacher"]["top1"]
    assert metrics[0]["teacher"]["loss"] == pytest.approx(metrics[1]["teacher"]["loss"])
