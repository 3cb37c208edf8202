"""The one training loop, for teachers and students, recipes and studies: Accelerate, timm's optimisers and schedulers.

A step asks the device for nothing: losses are summed there and read once an epoch. Whatever the model draws, dropout
for example, derives from (seed, epoch, process); whatever the batches draw is their maker's.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_igkd.data.labels import UNLABELED
from timm_igkd.distillation.task import IGDistillationTask
from timm_igkd.errors import DivergedError
from timm_igkd.eval_mode import bare_model
from timm_igkd.progress import progress_bar
from timm_igkd.random_streams import derive_seed, restored_state, seed_global
from timm_igkd.training.accelerator import renew_scale, telling_of_memory
from timm_igkd.training.batch import Batch, Batches
from timm_igkd.training.checkpoint import TrainingState, check_optimizer, refusing_damage
from timm_igkd.training.history import TERMS, EpochRecord, write_history
from timm_igkd.training.schedule import create_scheduler
from timm_igkd.training.settings import TrainingSettings
from timm_igkd.training.validation import validate

_LABELED = "labeled"
_CHECK_STEPS = 200  # long epochs end early where the loss is no longer finite; each check waits for the device


class Trainer:
    """Trains the trainable module of one task.

    A subclass may override `train_step`, `train_epoch` or `save_checkpoint`.

    Args:
        task: student (or the teacher as student of nobody); it is moved to the accelerator's device.
        batches: makes the batches of every epoch, on that device.
        settings: of the optimisation.
        accelerator: decides device, precision and processes; its trackers get every epoch.
        label: what errors, bars and trackers call it.
        checkpoint: file that holds the training after each epoch; where it is there, the training goes on from it.
        history_path: CSV, one row per epoch.
        validation: prepared loader of (input, label), or None.
    """

    def __init__(
        self,
        task: IGDistillationTask,
        batches: Batches,
        settings: TrainingSettings,
        accelerator: Accelerator,
        *,
        label: str = "student",
        checkpoint: Path | None = None,
        history_path: Path | None = None,
        validation: Any = None,
    ):
        self.task, self.batches, self.settings, self.accelerator = task, batches, settings, accelerator
        self.label, self.checkpoint, self.history_path, self.validation = label, checkpoint, history_path, validation
        self.history: list[EpochRecord] = []
        self.steps = len(batches)
        self.updates_per_epoch = math.ceil(self.steps / settings.grad_accum_steps)
        self._seconds = 0.0
        self._trained_epochs = 0
        self._has_updated = False
        task.to(accelerator.device)
        optimizer = create_optimizer_v2(  # before compilation, whose wrapper would rename the parameters
            task.trainable_module,
            opt=settings.opt,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            layer_decay=settings.layer_decay,
        )
        # not prepared: a prepared scheduler would step once per process
        self.scheduler = create_scheduler(optimizer, settings, self.updates_per_epoch)
        self._compiled = settings.compile_mode != "none"
        if self._compiled:
            task.compile(mode=settings.compile_mode)
        if settings.model_ema:
            task.setup_ema(decay=settings.model_ema_decay, use_warmup=settings.model_ema_warmup)
        if accelerator.num_processes > 1:  # alone the task's own autocast is all that a model needs
            task.trainable_module = accelerator.prepare_model(task.trainable_module)
        renew_scale(accelerator)
        self.optimizer = accelerator.prepare_optimizer(optimizer)

    def fit(self, progress: bool = True) -> list[EpochRecord]:
        """Train all epochs, or those that are left of an earlier training, and return the history of all.

        Args:
            progress: show a bar, where stderr is a terminal.

        Raises:
            DivergedError: the loss is no longer finite, or not one update was made, as gradients of fp16 were not.
            InputError: the checkpoint is damaged, or another training's.
            RunError: a device or a process of the loader is out of memory.
        """
        device = self.accelerator.device
        others = [device] if device.type == "cuda" else []
        with (
            telling_of_memory(self.label, self.batches.batch_size),
            restored_state(),
            torch.random.fork_rng(others, enabled=bool(others)),  # the host's draws go on as before
        ):
            return self._fit(progress)

    def _fit(self, progress: bool) -> list[EpochRecord]:
        self._load_checkpoint()
        left = range(len(self.history), self.settings.epochs)
        show = progress and self.accelerator.is_main_process
        with progress_bar(total=len(left) * self.steps, desc=self.label, unit="step", show=show, leave=False) as bar:
            for epoch in left:
                record = self.train_epoch(epoch, bar)
                self._average_norms()
                if self.validation is not None:
                    val_loss, val_top1 = validate(self.final_model(), self.validation, self.accelerator)
                    record = replace(record, val_loss=val_loss, val_top1=val_top1)
                self.history.append(record)
                shown = record.computed()
                bar.set_postfix({name: f"{shown[name]:.4g}" for name in ("loss", "val_top1") if name in shown})
                self._track(epoch, shown)
                if self.accelerator.is_main_process:
                    self.save_checkpoint()
                self.accelerator.wait_for_everyone()
        if self.history_path is not None and self.accelerator.is_main_process:
            write_history(self.history_path, self.history)  # also where a kill came between checkpoint and history
        return self.history

    def _track(self, epoch: int, shown: dict[str, float]) -> None:
        values = {f"{self.label}/{name}": value for name, value in shown.items()}
        for tracker in self.accelerator.trackers:
            # wandb drops a step below its last, and another training may have gone before; the epoch is a value too.
            tracker.log(values, step=None if tracker.name == "wandb" else epoch)

    def final_model(self) -> nn.Module:
        """Return the model to keep: the EMA where there is one."""
        model: nn.Module = bare_model(self.task.get_eval_model(ema=self.settings.model_ema))
        return model

    @property
    def images_per_s(self) -> float | None:
        """Training speed of the epochs trained here, or None where there were none."""
        images = self._trained_epochs * self.steps * self.batches.batch_size * self.accelerator.num_processes
        return images / self._seconds if images else None

    # ---- epochs and steps ----

    def train_epoch(self, epoch: int, bar: Any) -> EpochRecord:
        """Train one epoch, counted on in the bar, and return its means."""
        started = time.perf_counter()
        self._seed(epoch)
        self.task.train()
        if self.settings.freeze_bn:
            for module in self.task.trainable_module.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        totals: dict[str, Tensor] = {}
        for step, batch in enumerate(self.batches.epoch(epoch)):
            for name, value in self.train_step(batch, epoch, step).items():
                if name not in totals:
                    totals[name] = torch.zeros((), device=self.accelerator.device)
                totals[name] += value
            bar.update()
            if step % _CHECK_STEPS == _CHECK_STEPS - 1:
                self._check_finite(float(totals["loss"]), epoch)
        names = [*(name for name in TERMS if name in totals), _LABELED]
        sums = self.accelerator.reduce(torch.stack([totals[name] for name in names]), "mean").tolist()
        seconds = time.perf_counter() - started
        self._seconds, self._trained_epochs = self._seconds + seconds, self._trained_epochs + 1
        means = {name: value / self.steps for name, value in zip(names, sums, strict=True)}
        labeled = means.pop(_LABELED)
        for name in {"task_loss", "top1_train"} & set(means):  # over the labelled images alone
            value = means.pop(name)
            means |= {name: value / labeled} if labeled else {}
        self._check_finite(means["loss"], epoch)
        self._check_updates(epoch)
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        return EpochRecord(epoch, lr, **means, seconds=round(seconds, 3))

    def _seed(self, epoch: int) -> None:
        """Seed what the model draws, on every device; processes draw apart."""
        index = self.accelerator.process_index
        seed = derive_seed(self.settings.seed, "training", epoch, *([index] if index else []))
        torch.manual_seed(seed)
        seed_global(seed)

    def train_step(self, batch: Batch, epoch: int, step: int) -> dict[str, Tensor]:
        """Train one batch; return its loss, terms, hits in percent and share of labelled images, on the device.

        Cross-entropy and hits are per image of the batch, labelled or not.
        """
        accumulated = self.settings.grad_accum_steps
        first = step - step % accumulated  # of the batches of this update, of which an epoch's last has what is left
        last = min(first + accumulated, self.steps) - 1
        self.accelerator.gradient_accumulation_steps = last - first + 1  # by this it divides a loss
        is_update = step == last
        updates = epoch * self.updates_per_epoch + step // accumulated  # before this one
        self.scheduler.step_update(updates)
        if self._compiled:
            torch.compiler.cudagraph_mark_step_begin()
        with nullcontext() if is_update else self.accelerator.no_sync(self.task.trainable_module):
            with self.accelerator.autocast():
                beside = {"teacher_input": batch.teacher, "teacher_logits": batch.logits, "maps": batch.maps}
                result = self.task(batch.student, batch.labels, **beside)
            self.accelerator.backward(result["loss"])
        if is_update:
            self._update(updates + 1)
        labels = batch.labels.argmax(1) if batch.labels.ndim == 2 else batch.labels
        result["top1_train"] = 100 * (result["output"].argmax(1) == labels).float().mean()
        result[_LABELED] = (labels != UNLABELED).float().mean()
        if "task_loss" in result:
            result["task_loss"] = result["task_loss"] * result[_LABELED]
        return {name: result[name].detach() for name in (*TERMS, _LABELED) if name in result}

    def _update(self, number: int) -> None:
        if self.settings.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.task.get_clip_parameters(), self.settings.clip_grad)
        self.optimizer.step()
        self._has_updated |= not self.optimizer.step_was_skipped
        self.optimizer.zero_grad(set_to_none=True)
        self.task.update_ema(number)

    def _average_norms(self) -> None:
        """Average the batch norms' statistics over the processes, as timm does.

        DDP gives all of them the first one's before every batch, so this adds what each saw in its last batch.
        """
        if self.accelerator.num_processes > 1:
            for module in (self.task.trainable_module, self.task.get_trainable_module(ema=True)):
                if module is not None:
                    distribute_bn(module, self.accelerator.num_processes, reduce=True)

    def _check_finite(self, loss: float, epoch: int) -> None:
        if not math.isfinite(loss):
            message = (
                f"the loss of {self.label} became NaN or infinite in epoch {epoch}; lower lr ({self.settings.lr:g}), "
                "set clip_grad, or use another precision"
            )
            raise DivergedError(message, epoch)

    def _check_updates(self, epoch: int) -> None:
        """Raise where fp16 leaves out every update: its scale fell below 1, or training ends without any."""
        scaler, is_last = self.accelerator.scaler, epoch == self.settings.epochs - 1
        if scaler is not None and not self._has_updated and (is_last or scaler.get_scale() < 1):
            message = (
                f"the gradients of {self.label} were NaN or infinite in epoch {epoch} at every scale of fp16, so its "
                f"weights stay as they are; lower lr ({self.settings.lr:g}), or use another precision"
            )
            raise DivergedError(message, epoch)

    # ---- the file between epochs ----

    def save_checkpoint(self) -> None:
        """Write what a resumption needs, after every epoch and in the main process alone."""
        if self.checkpoint is not None:
            self._state().save(self.checkpoint)
        if self.history_path is not None:
            write_history(self.history_path, self.history)

    def _state(self) -> TrainingState:
        scaler = self.accelerator.scaler  # of fp16
        return TrainingState(
            self.history,
            self.task.get_checkpoint_state()["state_dict"],
            self.optimizer.state_dict(),
            self.task.get_checkpoint_state(ema=True)["state_dict_ema"] if self.settings.model_ema else None,
            None if scaler is None else scaler.state_dict(),
        )

    def _load_checkpoint(self) -> None:
        if self.checkpoint is None or not self.checkpoint.exists():
            return
        state = TrainingState.load(self.checkpoint)
        with refusing_damage(self.checkpoint):
            self.task.load_checkpoint_state(state.student)
            if self.settings.model_ema:
                self.task.load_checkpoint_state(state.student_ema or {}, ema=True)
            check_optimizer(state.optimizer, self.optimizer.param_groups)
            self.optimizer.load_state_dict(state.optimizer)
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state.scaler or {})
        self.history = list(state.history)
        self._has_updated = bool(self.optimizer.state)  # of most optimisers
