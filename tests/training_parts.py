"""A small training, as the tests of the loop run it."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tiny_parts import tiny_teacher

from timm_igkd import IGDistillationTask, IGOverlay
from timm_igkd.overlay.device_images import DeviceImages
from timm_igkd.overlay.device_views import DeviceAugmentation
from timm_igkd.training.device_batches import DeviceBatches
from timm_igkd.training.settings import TrainingSettings
from timm_igkd.training.trainer import Trainer

SETTINGS = {"opt": "sgd", "lr": 0.05, "sched": "none", "epochs": 2}


def images(n: int = 24, size: int = 16) -> DeviceImages:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    return DeviceImages(pixels, torch.arange(n) % 2)


def create_trainer(
    accelerator: Accelerator, checkpoint: Path | None = None, teacher: bool = True, batch_size: int = 4, **settings: Any
) -> Trainer:
    """Return a trainer of a student with dropout, by default with a live teacher."""
    student = tiny_teacher(size=16)
    student.drop_rate = 0.5  # type: ignore[assignment]
    weight = {"distill_loss_weight": 0.5 if teacher else 0.0}
    task = IGDistillationTask(
        student, tiny_teacher(size=16, seed=1) if teacher else None, teacher_view="same", verbose=False, **weight
    )
    share = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    augmentation = DeviceAugmentation(IGOverlay(0.0), padding=2, hflip=0.5)
    batches = DeviceBatches(images(), augmentation, batch_size, 0, **share)
    return Trainer(task, batches, TrainingSettings(**SETTINGS | settings), accelerator, checkpoint=checkpoint)
