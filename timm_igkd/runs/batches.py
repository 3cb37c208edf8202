"""Which road a run's batches take, DataLoader workers or the device, the batches, and what they ask of a model."""

import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from timm.data import create_transform
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_igkd.distillation.mixup import TwoViewMixup
from timm_igkd.distillation.options import TeacherViewMode
from timm_igkd.distillation.task import IGDistillationTask
from timm_igkd.errors import InputError, UserError, first_line
from timm_igkd.eval_mode import copy_model
from timm_igkd.maps.store import MapStore
from timm_igkd.models.arguments import model_data_config
from timm_igkd.overlay.blend import IGOverlay
from timm_igkd.overlay.dataset import IGOverlayDataset
from timm_igkd.overlay.device_images import DeviceImages, SeveralSizesError, StoredMaps
from timm_igkd.random_streams import restored_state
from timm_igkd.runs.data import RunData
from timm_igkd.runs.settings import RunConfig, Trained
from timm_igkd.training.accelerator import use_channels_last
from timm_igkd.training.batch import Batch, Batches
from timm_igkd.training.device_batches import DeviceBatches
from timm_igkd.training.trainer import Trainer
from timm_igkd.training.worker_batches import WorkerBatches

LARGEST_SIDE = 64
MEMORY_SHARE = 1 / 4
_SHOWN, _LEAST_SPREAD = 16, 0.01  # images that a model's batch norms are tried with; share of their outputs' spread
_CHANNELS = 8  # bytes of a pixel: three of the image, one of its map, and its colour once more in one number


def choose_batches(
    config: RunConfig, data: RunData, trained: Iterable[nn.Module], accelerator: Accelerator
) -> Literal["workers", "device"]:
    """Return who makes the batches where `batches` is auto.

    The device does where all of this holds, else DataLoader workers do:

    - the augmentation is a crop with padding, a flip, the overlay and the normalisation: no RandomResizedCrop,
      auto-augment, random erasing, Mixup or CutMix;
    - all images to fit have one size of at most 64 pixels a side, the input size of every model that is trained;
    - images and maps take at most a quarter of the memory that the device has in all, so that the choice does not
      depend on what else is running.

    Both draw crops, flips and coins from the same distributions, but not the same numbers; so config.yaml names the
    choice.

    Args:
        config: of the run.
        data: its images; read only as far as needed.
        trained: models that are going to be trained; asked for last.
        accelerator: of the run.
    """
    size = data.image_size
    if config.only_by_workers is not None or size is None or max(size) > LARGEST_SIDE:
        return "workers"
    height, width = size
    if len(data.student_images) * height * width * _CHANNELS > MEMORY_SHARE * _memory_per_process(accelerator):
        return "workers"
    if any(_input_size(model) != size for model in trained):
        return "workers"
    try:
        found = data.fitting_images
    except SeveralSizesError:
        return "workers"
    return "device" if _size(found) == size else "workers"


def _memory_per_process(accelerator: Accelerator) -> float:
    """Return the bytes of the device; processes of one machine share those of its CPU."""
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_properties(accelerator.device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / accelerator.num_processes


def _input_size(model: nn.Module) -> tuple[int, int]:
    height, width = model_data_config(model)["input_size"][1:]
    return height, width


def _size(images: DeviceImages) -> tuple[int, int]:
    height, width = images.images.shape[-2:]
    return height, width


def create_batches(
    config: RunConfig,
    data: RunData,
    task: IGDistillationTask,
    store: MapStore | None,
    accelerator: Accelerator,
    memory_format: torch.memory_format = torch.contiguous_format,
    *,
    with_unlabeled: bool = False,
) -> Batches:
    """Return the training batches of a teacher or student.

    Args:
        config: of the run, `batches` resolved.
        data: its images.
        task: what is trained.
        store: maps of the training split; None: no overlay and no stored logits, as a teacher is trained.
        accelerator: of the run.
        memory_format: of the views.
        with_unlabeled: also of the images without labels, as a student is trained.

    Raises:
        InputError: fewer images than a step needs, or images that cannot lie on the device as one tensor.
    """
    view: TeacherViewMode = config.teacher_view if task.two_view_batches else "same"
    create = _on_device if config.batches == "device" else _by_workers
    return create(config, data, task, store, view, accelerator, memory_format, with_unlabeled)


def _by_workers(
    config: RunConfig,
    data: RunData,
    task: IGDistillationTask,
    store: MapStore | None,
    view: TeacherViewMode,
    accelerator: Accelerator,
    memory_format: torch.memory_format,
    with_unlabeled: bool,
) -> Batches:
    dataset = IGOverlayDataset(
        data.student_images if with_unlabeled else data.fitting,
        store,
        config.overlay() if store else None,
        teacher_view=view,
        overlay_source=config.overlay_source,
        seed=config.seed,
        with_logits=config.stored_logits and store is not None,
        with_maps=config.explains and store is not None,
    )
    data_config = model_data_config(task.get_eval_model())
    dataset.transform = config.augmentation().transform(data_config)
    return WorkerBatches(
        dataset,
        config.batch_size,
        config.seed,
        accelerator.device,
        workers=config.workers,
        max_steps=config.max_steps_per_epoch,
        mixup=_create_mixup(config, data.num_classes),
        mean=data_config["mean"],
        std=data_config["std"],
        memory_format=memory_format,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )


def _create_mixup(config: RunConfig, num_classes: int) -> TwoViewMixup | None:
    if not config.mixes:
        return None
    return TwoViewMixup(
        config.seed,
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        label_smoothing=config.smoothing,
        num_classes=num_classes,
    )


def _on_device(
    config: RunConfig,
    data: RunData,
    task: IGDistillationTask,
    store: MapStore | None,
    view: TeacherViewMode,
    accelerator: Accelerator,
    memory_format: torch.memory_format,
    with_unlabeled: bool,
) -> Batches:
    images, dataset = data.fitting_images, data.student_images
    if not with_unlabeled and data.unlabeled is not None:
        images, dataset = images.subset(torch.arange(len(data.fitting))), data.fitting
    data_config = model_data_config(task.get_eval_model())
    if _size(images) != tuple(data_config["input_size"][1:]):
        raise InputError(
            f"batches device needs images of the model's input size {tuple(data_config['input_size'][1:])}, they are "
            f"{_size(images)}; use batches workers"
        )
    if store is not None:
        stored = StoredMaps(store, dataset, images)
        images = replace(
            images,
            maps=stored.maps(config.overlay_source, config.seed) if config.reads_maps else None,
            logits=stored.logits() if config.stored_logits else None,
        )
    overlay = config.overlay() if store else IGOverlay(0.0)
    return DeviceBatches(
        images.to(accelerator.device),
        config.augmentation().on_device(data_config, overlay, view),
        config.batch_size,
        config.seed,
        max_steps=config.max_steps_per_epoch,
        with_maps=config.explains and store is not None,
        memory_format=memory_format,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )


# ---- what batches ask of a model ----


def check_norms(config: RunConfig, data: RunData, name: Trained, model: nn.Module) -> None:
    """Raise InputError where batch norms keep a model from learning of the batches of a run.

    A batch norm takes no statistics of a single value. And some released weights come with statistics of their batch
    norms that are none of a batch's, made up for by their biases: right in eval mode, but normalised by a batch nothing
    passes the activations, so that the model sees no difference between images and no gradient comes back.
    """
    if getattr(config, f"freeze_{name}_bn") or not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return
    transform, images = create_transform(**model_data_config(model)), data.fitting
    shown = np.linspace(0, len(images) - 1, min(_SHOWN, len(images))).astype(int).tolist()
    batch = torch.stack([transform(image) for image, _ in images.read_each(shown)])
    with torch.no_grad(), restored_state():
        if config.batch_size == 1:
            try:
                copy_model(model).train()(batch[:1])
            except ValueError as error:
                raise InputError(
                    f"the {name} cannot train on batches of one image ({first_line(error)}); raise batch_size"
                ) from error
        if getattr(config, f"{name}_init") == "random":
            return
        spread = [float(copy_model(model).train(mode)(batch).std(0).mean()) for mode in (False, True)]
    if spread[1] < _LEAST_SPREAD * spread[0]:
        raise InputError(
            f"the {name}'s weights need the statistics that its batch norms hold: normalised by a batch, as in "
            f"training, its outputs for different images differ {spread[0] / max(spread[1], 1e-12):.0f} times "
            f"less, and it could not learn; add --freeze-{name}-bn"
        )


def check_trainable(
    config: RunConfig, data: RunData, name: Trained, task: IGDistillationTask, accelerator: Accelerator
) -> None:
    """Make one update with two images, so that what cannot be trained ends a run before anything is.

    Args:
        config: of the run.
        data: its images.
        name: of the model that the task trains.
        task: changed by it, and of no use afterwards.
        accelerator: of the run.

    Raises:
        InputError: as of `check_norms`, and for a model, loss or optimiser with which no step can be made.
    """
    model: Any = task.get_eval_model()
    check_norms(config, data, name, model)
    batch = _example(config, data, name, model, accelerator)
    batches: Any = [batch]
    settings = replace(config.training(name), compile_mode="none")
    try:
        with restored_state():
            images = batch.student.contiguous(memory_format=use_channels_last(task))
            batch = replace(batch, student=images, teacher=images if task.two_view_batches else None)
            Trainer(task, batches, settings, accelerator, label=name).train_step(batch, 0, 0)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # each architecture and optimiser says it with an exception of its own
        raise InputError(
            f"the {name} cannot be trained: a step with {len(batch.labels)} images ended in {type(error).__name__} "
            f"({first_line(error)}); choose another {name}, opt or img_size"
        ) from error
    finally:
        accelerator.free_memory()


def _example(config: RunConfig, data: RunData, name: Trained, model: nn.Module, accelerator: Accelerator) -> Batch:
    """Return a batch of the first images as the model sees them, with numbers for what is not computed yet."""
    transform = create_transform(**model_data_config(model))
    shown = list(data.fitting.read_each(range(min(2, config.batch_size))))
    images = torch.stack([transform(image) for image, _ in shown]).to(accelerator.device)
    labels = torch.tensor([label for _, label in shown], device=accelerator.device)
    ramp = torch.linspace(0, 1, len(images) * data.num_classes, device=accelerator.device).view(len(images), -1)
    is_student = name == "student"
    return Batch(
        images,
        None,
        nn.functional.one_hot(labels, data.num_classes).float() if config.mixes else labels,
        ramp if is_student and config.stored_logits else None,
        images[:, :1].abs() if is_student and config.explains else None,
    )
