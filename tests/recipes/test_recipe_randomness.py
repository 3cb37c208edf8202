"""Seeds, workers and epochs of the recipe: what repeats, what is shared, what differs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_parts import equal, weights
from torch import Tensor

from timm_igkd.training.trainer import Trainer


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


@pytest.mark.parametrize("batches", ["workers", "device"])
@pytest.mark.parametrize("crop", ["none", "pad"])
def test_epochs_differ_in_order_and_crops(
    batches: str,
    crop: str,
    run: Callable[..., Path],
    trained_teacher: list[object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Uncropped, both epochs show the same images in another order; cropped, no image is twice the same."""
    epochs: list[list[Tensor]] = [[], []]
    real = Trainer.train_step

    def train_step(self: Trainer, batch: Any, epoch: int, step: int) -> Any:
        if len(batch.student) == 4:  # not the step of two images that is tried before
            epochs[epoch] += [image.clone() for image in batch.student]
        return real(self, batch, epoch, step)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    shared = ["--overlay-prob", 0, "--hflip", 0, "--train-crop", crop, "--validation-fraction", 0]
    run(*trained_teacher, *shared, "--epochs", 2, "--batches", batches, name="two")
    assert [len(epoch) for epoch in epochs] == [16, 16]
    first, second = ([image.numpy().tobytes() for image in epoch] for epoch in epochs)
    if crop == "none":
        assert first != second
        assert sorted(first) == sorted(second)
    else:
        assert len({*first, *second}) > 16
