"""Training that stops and goes on: bit for bit, or refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from command_lines import Runner, tiny_run
from recipe_parts import equal, history, snapshot, weights

from timm_igkd import rounded_bfloat16
from timm_igkd.errors import RunError
from timm_igkd.runs import stages
from timm_igkd.training import accelerator
from timm_igkd.training.trainer import Trainer


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


def half_trained(
    recipe: Runner, images: Path, trained_teacher: list[object], monkeypatch: pytest.MonkeyPatch
) -> list[object]:
    """Stop a run after the first of its student's two epochs; return its options."""
    options = [*trained_teacher, "--epochs", 2]
    with monkeypatch.context() as patch:
        stop_after(patch, "student", 1)
        assert recipe(*tiny_run(images, *options)).code == 1
    return options


def test_resume_with_other_cpu_threads_goes_on_and_says_so(
    recipe: Runner, images: Path, trained_teacher: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = half_trained(recipe, images, trained_teacher, monkeypatch)
    threads = torch.get_num_threads()
    monkeypatch.setattr(stages.torch, "get_num_threads", lambda: threads + 1)
    outcome = recipe(*tiny_run(images, *options, "--resume"))
    assert outcome.code == 0, outcome.error
    assert f"student: begun with {threads} CPU threads, goes on with {threads + 1}" in outcome.output


def test_resume_on_a_processor_without_bfloat16_goes_on_and_says_so(
    recipe: Runner, images: Path, trained_teacher: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = half_trained(recipe, images, trained_teacher, monkeypatch)
    rounded_bfloat16.compute_in_float32()
    try:
        outcome = recipe(*tiny_run(images, *options, "--resume"))
    finally:
        rounded_bfloat16.compute_in_bfloat16()
    assert outcome.code == 0, outcome.error
    said = "student: begun with torch's own products in bfloat16, goes on with products in float32, rounded"
    assert said in outcome.output
    assert "CPU threads" not in outcome.output


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
