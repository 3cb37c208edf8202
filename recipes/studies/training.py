"""One run of a study: a student trained from random weights on batches that are made on the device."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from studies.cells import Cell
from timm_igkd import IGDistillationTask, IGOverlay
from timm_igkd.models.arguments import model_data_config
from timm_igkd.overlay.device_images import DeviceImages
from timm_igkd.overlay.device_views import DeviceAugmentation
from timm_igkd.runs.models import create_task
from timm_igkd.training.device_batches import DeviceBatches
from timm_igkd.training.trainer import Trainer


def create_batches(cell: Cell, seed: int, data: DeviceImages, task: IGDistillationTask) -> DeviceBatches:
    """Return the training batches of a run."""
    config = model_data_config(task.get_eval_model())
    augmentation = DeviceAugmentation(
        overlay=IGOverlay(cell.overlay_prob, cell.overlay_weight, cell.overlay_max_power),
        padding=cell.padding,
        padding_mode=cell.padding_mode,
        hflip=cell.hflip,
        alternate_flip=cell.alternate_flip,
        cutout=cell.cutout,
        mean=config["mean"],
        std=config["std"],
        teacher_view="clean" if task.two_view_batches else "same",
    )
    return DeviceBatches(data, augmentation, cell.batch_size, seed, with_maps=cell.explanation_loss_weight > 0)


def create_trainer(
    cell: Cell,
    seed: int,
    data: DeviceImages,
    student: nn.Module,
    teacher: nn.Module | None,
    accelerator: Accelerator,
    *,
    compile_mode: str = "none",
    checkpoint: Path | None = None,
    label: str = "student",
) -> Trainer:
    """Return the trainer of one student of one cell and seed.

    Args:
        cell: the recipe.
        seed: of order, augmentation and dropout; the student comes initialised.
        data: on the accelerator's device.
        student: with random weights.
        teacher: on the device, or None.
        accelerator: of one process; it decides precision.
        compile_mode: of torch.compile, or "none".
        checkpoint: file that holds the run after each epoch; where it is there, the run goes on from it.
        label: names the run for trackers.
    """
    student.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    criterion = nn.CrossEntropyLoss(label_smoothing=cell.smoothing)
    task = create_task(cell, student, teacher, criterion, verbose=False)
    batches = create_batches(cell, seed, data, task)
    settings = cell.training(seed, compile_mode)
    return Trainer(task, batches, settings, accelerator, label=label, checkpoint=checkpoint)
