"""The recipe end to end in seconds: stages, arms, randomness. Kills and several processes: test_kill.py."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from accelerate import Accelerator
from command_lines import RECIPES, Runner, leave_empty_page, tiny_run, two_splits
from fixture_parts import ImageFactory
from torch import Tensor

from timm_igkd import IGDistillationTask, MapStore, evaluate, load_labeled_images
from timm_igkd.data.subsets import stratified_limit
from timm_igkd.errors import InputError, RunError
from timm_igkd.models.loading import load_model, save_model
from timm_igkd.overlay.dataset import IGOverlayDataset
from timm_igkd.runs import job, stages, students
from timm_igkd.runs.parsing import parse_config
from timm_igkd.runs.settings import RunConfig
from timm_igkd.training import accelerator
from timm_igkd.training.history import TERMS
from timm_igkd.training.trainer import Trainer

CONFIGS = sorted(set((RECIPES / "configs").glob("*.yaml")) - set((RECIPES / "configs").glob("study_*.yaml")))


def weights(run: Path, name: str = "student") -> dict[str, Tensor]:
    return safetensors.torch.load_file(run / name / "model.safetensors")


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def history(run: Path, name: str = "student") -> list[dict[str, str]]:
    lines = [line.split(",") for line in (run / f"{name}_history.csv").read_text().splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


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


# ---- configuration ----


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


# ---- stages ----


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
    assert {name: content for name, (content, _) in after.items()} == {
        name: content for name, (content, _) in before.items()
    }
    assert {name for name in before if before[name] != after[name]} <= {"metrics.json"}


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


class Stop(RunError):
    """Stands for a kill between two epochs."""


def stop_after(monkeypatch: pytest.MonkeyPatch, label: str, epoch: int) -> None:
    """Let the training of `label` stop once `epoch` epochs are saved."""
    real = Trainer.save_checkpoint

    def save(self: Trainer) -> None:
        real(self)
        if len(self.history) == epoch and self.label.startswith(label):
            raise Stop("stopped by the test")

    monkeypatch.setattr(Trainer, "save_checkpoint", save)


@pytest.mark.parametrize(
    ("label", "options"),
    [
        ("teacher", ["--teacher-epochs", 3]),
        ("student", ["--batches", "workers", "--workers", 1, "--overlay-prob", 0.5]),
        ("student", ["--batches", "device", "--overlay-prob", 0.5, "--hflip", 0.5, "--distill-loss-weight", 0.5]),
        ("student", ["--model-ema", "--grad-accum-steps", 2, "--mixup", 0.2]),
        ("student", ["--max-steps-per-epoch", 2, "--grad-accum-steps", 3, "--sched", "none"]),
    ],
)
def test_resumed_training_ends_with_the_weights_of_an_uninterrupted_one(
    label: str,
    options: list[object],
    recipe: Runner,
    run: Callable[..., Path],
    images: Path,
    trained_teacher: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = [*trained_teacher, "--epochs", 3, *options] if label == "student" else options
    whole = run(*options, name="whole")
    with monkeypatch.context() as patch:
        stop_after(patch, label, 2)
        outcome = recipe(*tiny_run(images, *options))
        assert outcome.code == 1
    folder = tmp_path / "runs" / "run"
    assert not (folder / label).exists()
    before = snapshot(folder)
    outcome = recipe(*tiny_run(images, *options))
    assert outcome.code == 2
    assert "--resume" in outcome.error
    assert snapshot(folder) == before

    run(*options, "--resume")
    assert equal(weights(whole, label), weights(folder, label))
    rows, expected = history(folder, label), history(whole, label)
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]
    assert len(rows) == 3
    assert not (folder / f"{label}_training").exists()


def test_resume_goes_on_with_the_scale_of_the_fp16_gradients(
    recipe: Runner,
    images: Path,
    trained_teacher: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """fp16 needs a GPU: here a scaler that doubles every two steps stands in an ordinary run."""
    scales: list[float] = []

    class WithScaler(Accelerator):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

    monkeypatch.setattr(accelerator, "Accelerator", WithScaler)
    real = Trainer.train_epoch

    def train_epoch(self: Trainer, *args: Any) -> Any:
        scales.append(self.accelerator.scaler.get_scale())
        return real(self, *args)

    monkeypatch.setattr(Trainer, "train_epoch", train_epoch)
    options = [*trained_teacher, "--epochs", 3, "--max-steps-per-epoch", 2]
    with monkeypatch.context() as patch:
        stop_after(patch, "student", 2)
        assert recipe(*tiny_run(images, *options)).code == 1
    outcome = recipe(*tiny_run(images, *options, "--resume"))
    assert outcome.code == 0, outcome.error
    assert scales == [8.0, 16.0, 32.0]


def test_resume_with_other_cpu_threads_goes_on_and_says_so(
    recipe: Runner, images: Path, trained_teacher: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*trained_teacher, "--epochs", 2]
    with monkeypatch.context() as patch:
        stop_after(patch, "student", 1)
        assert recipe(*tiny_run(images, *options)).code == 1
    threads = torch.get_num_threads()
    monkeypatch.setattr(stages.torch, "get_num_threads", lambda: threads + 1)
    outcome = recipe(*tiny_run(images, *options, "--resume"))
    assert outcome.code == 0, outcome.error
    assert f"student: begun with {threads} CPU threads, goes on with {threads + 1}" in outcome.output


def test_other_settings_for_a_half_trained_student_are_refused(
    recipe: Runner, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, "student", 1)
        assert recipe(*tiny_run(images, "--epochs", 2)).code == 1
    before = snapshot(tmp_path / "runs" / "run")
    outcome = recipe(*tiny_run(images, "--epochs", 3, "--resume"))
    assert outcome.code == 2
    assert "epochs = 2" in outcome.error
    assert snapshot(tmp_path / "runs" / "run") == before


def test_corruptions_are_measured_where_they_are_asked_for(
    run: Callable[..., Path], trained_teacher: list[object]
) -> None:
    metrics = json.loads((run(*trained_teacher, "--corruptions", 2, report=True) / "metrics.json").read_text())
    assert metrics["robustness"]["n"] == metrics["teacher"]["robustness"]["n"] == 2


# ---- arms ----

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
        "--train-crop rrc --hflip 0.5 --aa rand-m9-mstd0.5 --color-jitter 0.4 --reprob 0.5 --smoothing 0.1",
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
    overlaid = [*seen]
    assert len(overlaid) == 3
    assert all(target.ndim == 2 and not torch.equal(student, teacher) for student, teacher, target in overlaid)
    seen.clear()
    run(*trained_teacher, *options, 0, name="weightless")  # the overlay leaves the image as it is: both views are one
    assert all(torch.equal(student, teacher) for student, teacher, _ in seen)
    assert all(torch.equal(was[1], now[1]) for was, now in zip(overlaid, seen, strict=True))


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


# ---- randomness ----


def test_one_seed_repeats_bit_for_bit_and_another_differs(run: Callable[..., Path]) -> None:
    first, second = run(name="first"), run(name="second")
    other = run("--seed", 1, name="other")
    for name in ("teacher", "student"):
        assert equal(weights(first, name), weights(second, name))
        assert not equal(weights(first, name), weights(other, name))


def test_workers_change_nothing(run: Callable[..., Path], trained_teacher: list[object]) -> None:
    options = [*trained_teacher, "--epochs", 2, "--overlay-prob", 0.5, "--hflip", 0.5, "--reprob", 0.3]
    none = run(*options, "--workers", 0, name="none")
    two = run(*options, "--workers", 2, name="two")
    assert equal(weights(none), weights(two))


@pytest.mark.parametrize("batches", ["workers", "device"])
def test_arms_of_one_seed_share_init_order_and_crops(
    batches: str, run: Callable[..., Path], trained_teacher: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Tensor]] = {}
    real = Trainer.train_step

    def train_step(self: Trainer, batch: Any, epoch: int, step: int) -> Any:
        teacher_view = batch.student if batch.teacher is None else batch.teacher
        init = [p.detach().clone() for p in self.task.parameters()] if epoch == step == 0 else []
        seen.setdefault(arm, []).extend([*init[:20], teacher_view.clone(), batch.labels.clone()])
        return real(self, batch, epoch, step)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    arms = {
        "kd": ["--overlay-prob", 0],
        "kd_ig": [
            "--overlay-prob",
            1,
        ],  # the teacher's view is the clean one, whose crops must be those of the other arm
        "ig_free": ["--overlay-prob", 0, "--temperature", 9],
    }
    for arm, options in arms.items():
        shared = ["--epochs", 2, "--hflip", 0.5, "--distill-loss-weight", 0.5, "--batches", batches]
        shared += ["--teacher-view", "clean"]
        run(*trained_teacher, *shared, *options, name=arm)
    assert len(seen["kd"]) > 20
    for arm in ("kd_ig", "ig_free"):
        assert all(torch.equal(a, b) for a, b in zip(seen["kd"], seen[arm], strict=True))
    batches = [tensor for tensor in seen["kd"] if tensor.ndim == 4 and tensor.shape[0] == 4]
    assert not torch.equal(batches[-1], batches[-2])


def test_epochs_differ_in_order_and_crops(
    run: Callable[..., Path], trained_teacher: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs: list[int] = []
    real = IGOverlayDataset.draw

    def draw(self: IGOverlayDataset, index: int) -> Any:
        epochs.append(int(self._epoch))
        return real(self, index)

    monkeypatch.setattr(IGOverlayDataset, "draw", draw)
    run(*trained_teacher, "--epochs", 2, "--max-steps-per-epoch", 1, "--batches", "workers", name="two")
    assert epochs == [0] * 4 + [1] * 4


# ---- published configurations ----


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
