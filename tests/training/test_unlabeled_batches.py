"""What the training loop says of batches in which some images have no label."""

import pytest
import torch
from accelerate import Accelerator
from tiny_parts import tiny_teacher

from timm_igkd import IGDistillationTask, IGOverlay
from timm_igkd.distillation.labeled_loss import LabeledCrossEntropy
from timm_igkd.overlay.device_images import DeviceImages
from timm_igkd.overlay.device_views import DeviceAugmentation
from timm_igkd.training.device_batches import DeviceBatches
from timm_igkd.training.history import EpochRecord
from timm_igkd.training.settings import TrainingSettings
from timm_igkd.training.trainer import Trainer


def record_of(labels: list[int], accelerator: Accelerator) -> EpochRecord:
    """Return the epoch of a student that says class 0 of every image, in batches of 2."""
    student = tiny_teacher(size=16)
    with torch.no_grad():
        student.get_classifier().bias[0] = 1e4  # type: ignore[operator]
    task = IGDistillationTask(
        student, tiny_teacher(size=16, seed=1), LabeledCrossEntropy(), distill_loss_weight=0.5, verbose=False
    )
    pixels = torch.zeros(len(labels), 3, 16, 16, dtype=torch.uint8)
    batches = DeviceBatches(DeviceImages(pixels, torch.tensor(labels)), DeviceAugmentation(IGOverlay(0.0)), 2, 0)
    settings = TrainingSettings(opt="sgd", lr=1e-9, sched="none", epochs=1)
    (record,) = Trainer(task, batches, settings, accelerator).fit(progress=False)
    return record


@pytest.mark.parametrize(("labels", "top1"), [([0, -1, 0, -1, -1, -1], 100), ([0, -1, 1, -1, 1, 1], 25)])
def test_accuracy_and_cross_entropy_are_of_the_images_with_labels(labels, top1, accelerator):
    record = record_of(labels, accelerator)
    assert record.top1_train == pytest.approx(top1)
    assert record.task_loss == pytest.approx(1e4 * (1 - top1 / 100), rel=1e-3, abs=1e-3)  # of a wrong answer: the bias


def test_epoch_without_any_label_has_no_training_accuracy(accelerator):
    record = record_of([-1] * 4, accelerator)
    assert record.top1_train is None
    assert record.task_loss is None
