"""One training loop for teacher and student: Accelerate, timm optimisers and schedulers, epoch-exact resume.

Every random draw is derived from (seed, purpose, epoch, sample or step), so a checkpoint needs no random state and a
run that was killed and resumed ends with the weights of one that was not.
"""

import csv
import io
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.utils.data
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from timm.utils import distribute_bn
from torch import Tensor, nn
from tqdm.auto import tqdm

from schedule import create_scheduler
from timm_igkd import IGDistillationTask
from timm_igkd.distillation.mixup import TwoViewMixup
from timm_igkd.errors import InputError, RunError
from timm_igkd.files import write_atomic
from timm_igkd.random_streams import derive_seed, generator, seed_global
from train_config import TrainConfig

HISTORY = "epoch lr loss task_loss distill_loss attention_loss top1_train val_loss val_top1 seconds".split()


class EpochSampler(torch.utils.data.Sampler[int]):
    """The first `length` indices of a permutation of its own per (seed, epoch)."""

    def __init__(self, n: int, length: int, seed: int):
        self.n, self.length, self.seed, self.epoch = n, length, seed, 0

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(generator(self.seed, "order", self.epoch).permutation(self.n)[: self.length].tolist())


def create_train_loader(dataset: Any, config: TrainConfig, num_processes: int = 1) -> torch.utils.data.DataLoader:
    """Return a loader of whole batches, as many for each process, in an order that only (seed, epoch) decide."""
    images_per_step = config.batch_size * num_processes
    steps = min(len(dataset) // images_per_step, config.max_steps_per_epoch or sys.maxsize)
    if steps == 0:
        raise InputError(
            f"a step needs {images_per_step} images (batch_size {config.batch_size}, processes {num_processes}), there "
            f"are {len(dataset)} to train on; lower batch_size"
        )
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=config.batch_size,
        sampler=EpochSampler(len(dataset), steps * images_per_step, config.seed),
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        drop_last=True,
    )


class Trainer:
    """Trains one task in one folder.

    Args:
        task: student (or the teacher as student of nobody).
        dataset: an IGOverlayDataset with its transform set; items (views, label[, logits]).
        validation: loader of (input, label), or None.
        config: the run's settings; `epochs` is given apart, since the teacher has its own.
        folder: where the checkpoint is kept until the stage is complete.
        history_path: CSV, one row per epoch.
    """

    def __init__(
        self,
        task: IGDistillationTask,
        dataset: Any,
        validation: Any,
        config: TrainConfig,
        epochs: int,
        accelerator: Accelerator,
        folder: Path,
        history_path: Path,
    ):
        self.task, self.dataset, self.validation = task, dataset, validation
        self.config, self.epochs, self.accelerator = config, epochs, accelerator
        self.checkpoint, self.history_path, self.label = folder / "last.pt", history_path, folder.name
        loader = create_train_loader(dataset, config, accelerator.num_processes)
        task.to(accelerator.device)
        if config.compile:
            task.compile()
        if config.model_ema:
            task.setup_ema(decay=config.model_ema_decay)
        optimizer = create_optimizer_v2(
            task.trainable_module,
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
        )
        task.trainable_module, self.optimizer, self.loader = accelerator.prepare(
            task.trainable_module, optimizer, loader
        )
        self.steps = len(self.loader)
        self.updates_per_epoch = math.ceil(self.steps / config.grad_accum_steps)
        self.scheduler = self._create_scheduler(optimizer)
        self.mixup = self._create_mixup()

    def _create_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        # not prepared: a prepared scheduler would step once per process
        return create_scheduler(
            optimizer,
            self.config.sched,
            lr=self.config.lr,
            epochs=self.epochs,
            updates_per_epoch=self.updates_per_epoch,
            warmup_epochs=self.config.warmup_epochs,
            min_lr=self.config.min_lr,
        )

    def _create_mixup(self) -> TwoViewMixup | None:
        config = self.config
        if config.mixup == 0 and config.cutmix == 0:
            return None
        num_classes: Any = self.final_model().num_classes
        return TwoViewMixup(
            config.seed,
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            label_smoothing=config.smoothing,
            num_classes=num_classes,
        )

    def fit(self) -> None:
        """Train all epochs, or those that are left after a resume."""
        start, rows = self._load_checkpoint() if self.config.resume else (0, [])
        total = (self.epochs - start) * self.steps
        hidden = None if self.accelerator.is_main_process else True  # None: hidden where stderr is no terminal
        with tqdm(total=total, desc=self.label, unit="step", disable=hidden) as bar:
            for epoch in range(start, self.epochs):
                row = self._train_epoch(epoch, bar)
                self._average_norms()
                row |= self._validate()
                rows.append(row)
                bar.set_postfix({name: f"{row[name]:.4g}" for name in ("loss", "val_top1") if row.get(name) != ""})
                self.accelerator.log({f"{self.label}/{name}": row[name] for name in row if row[name] != ""}, step=epoch)
                if self.accelerator.is_main_process:
                    self._save_checkpoint(epoch + 1, rows)
                self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            _write_history(self.history_path, rows)

    def _train_epoch(self, epoch: int, bar: Any) -> dict[str, Any]:
        self.task.train()
        self.dataset.set_epoch(epoch)
        self.loader.set_epoch(epoch)  # accelerate's loader counts epochs itself, from 0 after a resume
        totals: dict[str, Any] = {}
        started = time.perf_counter()
        for step, batch in enumerate(self.loader):
            seed_global(derive_seed(self.config.seed, "step", epoch, step, self.accelerator.process_index))
            result, target = self._train_step(batch, epoch, step)
            hard = target.argmax(1) if target.ndim == 2 else target
            result["top1_train"] = 100 * (result["output"].detach().argmax(1) == hard).float().mean()
            for name in result.keys() & set(HISTORY):
                totals[name] = totals.get(name, 0.0) + result[name].detach()
            bar.update()
            if step % 50 == 49 or step == self.steps - 1:
                self._check_finite(totals["loss"], epoch)
        means = {name: float(value) for name, value in self.accelerator.reduce(totals, "mean").items()}
        row: dict[str, Any] = dict.fromkeys(HISTORY, "") | {"epoch": epoch, "lr": self.optimizer.param_groups[0]["lr"]}
        row |= {name: value / self.steps for name, value in means.items()}
        return row | {"seconds": round(time.perf_counter() - started, 3)}

    def _train_step(self, batch: Any, epoch: int, step: int) -> tuple[dict[str, Tensor], Tensor]:
        views, target, *stored = batch
        student, teacher = views if isinstance(views, (list, tuple)) else (views, None)
        if self.mixup is not None:
            student, teacher, target = self.mixup(student, teacher, target, epoch, step, self.accelerator.process_index)
        with self.accelerator.accumulate(self.task.trainable_module):
            if self.scheduler is not None:
                self.scheduler.step_update(epoch * self.updates_per_epoch + step // self.config.grad_accum_steps)
            with self.accelerator.autocast():
                result = self.task(student, target, teacher_input=teacher, teacher_logits=stored[0] if stored else None)
            self.accelerator.backward(result["loss"])
            if self.accelerator.sync_gradients and self.config.clip_grad:
                self.accelerator.clip_grad_norm_(self.task.get_clip_parameters(), self.config.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                self.task.update_ema()
        return result, target

    def _average_norms(self) -> None:
        """Average the batch norms' statistics over the processes, which each gather their own."""
        if self.accelerator.num_processes > 1:
            for module in (self.task.trainable_module, getattr(self.task, "trainable_module_ema", None)):
                if module is not None:
                    distribute_bn(module, self.accelerator.num_processes, reduce=True)

    def _check_finite(self, total: Tensor, epoch: int) -> None:
        if not math.isfinite(float(total)):
            raise RunError(
                f"the loss of {self.label} became NaN or infinite in epoch {epoch}; lower lr ({self.config.lr:g}), set "
                "clip_grad, or use another precision"
            )

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        if self.validation is None:
            return {}
        model = self.final_model()
        mode = model.training
        model.eval()
        loss, correct, n = 0.0, 0, 0
        for images, labels in self.validation:
            with self.accelerator.autocast():
                logits = model(images).float()
            losses = nn.functional.cross_entropy(logits, labels, reduction="none")
            losses, hits = self.accelerator.gather_for_metrics((losses, logits.argmax(1) == labels))
            loss, correct, n = loss + float(losses.sum()), correct + int(hits.sum()), n + len(hits)
        model.train(mode)
        return {"val_loss": loss / n, "val_top1": 100 * correct / n}

    def final_model(self) -> nn.Module:
        """Return the model to keep: the EMA where there is one."""
        model: Any = self.task.get_eval_model(ema=self.config.model_ema)
        return getattr(model, "_orig_mod", model)

    def _save_checkpoint(self, epoch: int, rows: list[dict[str, Any]]) -> None:
        state = {"epoch": epoch, "rows": rows, "optimizer": self.optimizer.state_dict()}
        state |= self.task.get_checkpoint_state()
        if self.config.model_ema:
            state |= self.task.get_checkpoint_state(ema=True)
        if self.accelerator.scaler is not None:  # mixed precision fp16
            state["scaler"] = self.accelerator.scaler.state_dict()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(self.checkpoint, buffer.getvalue())
        _write_history(self.history_path, rows)

    def _load_checkpoint(self) -> tuple[int, list[dict[str, Any]]]:
        if not self.checkpoint.exists():
            return 0, []
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        self.task.load_checkpoint_state(state["state_dict"])
        if self.config.model_ema:
            self.task.load_checkpoint_state(state["state_dict_ema"], ema=True)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return state["epoch"], state["rows"]


def _write_history(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, HISTORY)
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())


def create_validation_loader(dataset: Any, transform: Callable, config: TrainConfig, accelerator: Accelerator) -> Any:
    """Return a prepared loader of (input, label), or None without validation images."""
    if dataset is None or len(dataset) == 0:
        return None
    dataset.transform = transform
    loader = torch.utils.data.DataLoader(dataset, batch_size=max(64, config.batch_size), num_workers=config.workers)
    return accelerator.prepare(loader)
