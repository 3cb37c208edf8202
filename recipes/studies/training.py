"""One run of a study: a student trained from random weights on batches that are made on the device."""

import io
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from tqdm.auto import tqdm

from schedule import create_scheduler
from studies.config import Cell
from timm_igkd import IGDistillationTask, IGOverlay
from timm_igkd.errors import RunError
from timm_igkd.files import write_atomic
from timm_igkd.overlay.device_images import DeviceImages
from timm_igkd.overlay.device_loader import Batch, DeviceAugmentation, DeviceLoader
from timm_igkd.random_streams import derive_seed, seed_global

_BATCHES_AT_ONCE = {"cuda": 16, "cpu": 4}


class DivergedError(RunError):
    """The loss of a run is no longer finite.

    Attributes:
        epoch: the first such epoch.
    """

    def __init__(self, message: str, epoch: int):
        super().__init__(message)
        self.epoch = epoch


@dataclass(frozen=True)
class Trained:
    """A trained student, its last epoch's mean loss, and the speed of the epochs trained by this process."""

    student: nn.Module
    loss: float
    images_per_s: float


def create_loader(cell: Cell, seed: int, data: DeviceImages, task: IGDistillationTask) -> DeviceLoader:
    """Return the training batches of a run."""
    student = task.get_eval_model()
    config = resolve_model_data_config(student)
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
    return DeviceLoader(data, augmentation, cell.batch_size, seed, _BATCHES_AT_ONCE.get(data.labels.device.type, 1))


def create_task(cell: Cell, student: nn.Module, teacher: nn.Module | None) -> IGDistillationTask:
    """Return the task of an arm; its teacher is in the loop only where the cell asks for it."""
    return IGDistillationTask(
        student,
        teacher if cell.needs_live_teacher else None,
        nn.CrossEntropyLoss(label_smoothing=cell.smoothing),
        loss_type=cell.loss_type,
        distill_loss_weight=cell.distill_loss_weight,
        temperature=cell.temperature,
        attention_loss_weight=cell.attention_loss_weight,
        teacher_view=cell.teacher_view if cell.needs_maps else "same",
        verbose=False,
    )


class RunTrainer:
    """Trains one student of one cell and seed.

    Args:
        cell: the recipe.
        seed: of order, augmentation and dropout; the student comes initialised.
        data: on the accelerator's device.
        student: with random weights.
        teacher: on the device, or None.
        accelerator: of one process; it decides precision.
        compile_mode: of torch.compile, or "none".
        checkpoint: file that holds the run after each epoch; where it is there, the run goes on from it.
    """

    def __init__(
        self,
        cell: Cell,
        seed: int,
        data: DeviceImages,
        student: nn.Module,
        teacher: nn.Module | None,
        accelerator: Accelerator,
        compile_mode: str = "none",
        checkpoint: Path | None = None,
    ):
        self.checkpoint = checkpoint
        self.cell, self.seed, self.accelerator, self.compiled = cell, seed, accelerator, compile_mode != "none"
        student.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.student = student
        self.task = create_task(cell, student, teacher)
        self.loader = create_loader(cell, seed, data, self.task)
        optimizer = create_optimizer_v2(
            self.task.trainable_module,
            opt=cell.opt,
            lr=cell.lr,
            weight_decay=cell.weight_decay,
            momentum=cell.momentum,
        )
        if self.compiled:
            self.task.compile(mode=compile_mode)
        self.scheduler = self._create_scheduler(optimizer)
        self.optimizer: Any = accelerator.prepare(optimizer)

    def _create_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        return create_scheduler(
            optimizer,
            self.cell.sched,
            lr=self.cell.lr,
            epochs=self.cell.epochs,
            updates_per_epoch=len(self.loader),
            warmup_epochs=self.cell.warmup_epochs,
        )

    def fit(self, progress: bool = True) -> Trained:
        """Train all epochs.

        Raises:
            DivergedError: the loss is no longer finite.
        """
        first, loss = self._load_checkpoint()
        seconds = 0.0
        bar = tqdm(
            range(first, self.cell.epochs),
            desc="epochs",
            initial=first,
            total=self.cell.epochs,
            leave=False,
            disable=None if progress else True,
        )
        for epoch in bar:
            started = time.perf_counter()
            torch.manual_seed(derive_seed(self.seed, "training", epoch))  # dropout, on every device
            seed_global(derive_seed(self.seed, "training", epoch))
            loss = self._train_epoch(epoch)
            seconds += time.perf_counter() - started
            if not math.isfinite(loss):
                message = f"the loss became NaN or infinite in epoch {epoch}; lower lr ({self.cell.lr:g})"
                raise DivergedError(message, epoch)
            bar.set_postfix(loss=f"{loss:.4f}")
            self._save_checkpoint(epoch + 1, loss)
        images = (self.cell.epochs - first) * len(self.loader) * self.cell.batch_size
        return Trained(self.student, loss, images / seconds if seconds else math.nan)

    def _save_checkpoint(self, epochs_done: int, loss: float) -> None:
        if self.checkpoint is None or epochs_done == self.cell.epochs:
            return
        buffer = io.BytesIO()
        state = {"epochs_done": epochs_done, "loss": loss, "student": self.student.state_dict()}
        torch.save(state | {"optimizer": self.optimizer.state_dict()}, buffer)
        write_atomic(self.checkpoint, buffer.getvalue())

    def _load_checkpoint(self) -> tuple[int, float]:
        """Return the epochs done and the last one's loss."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return 0, math.nan
        state = torch.load(self.checkpoint, map_location=self.accelerator.device, weights_only=True)
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        return state["epochs_done"], state["loss"]

    def _train_epoch(self, epoch: int) -> float:
        """Train one epoch and return its mean loss; the accelerator is waited for once, here."""
        self.task.train()
        total = torch.zeros((), device=self.accelerator.device)
        for step, batch in enumerate(self.loader.epoch(epoch)):
            if self.scheduler is not None:
                self.scheduler.step_update(epoch * len(self.loader) + step)
            total += self._step(batch)
        return float(total) / len(self.loader)

    def _step(self, batch: Batch) -> Tensor:
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        with self.accelerator.autocast():
            result = self.task(batch.student, batch.labels, teacher_input=batch.teacher, teacher_logits=batch.logits)
        self.accelerator.backward(result["loss"])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return result["loss"].detach()
