"""The learning rate over a training, by timm's schedulers, stepped at every update."""

from typing import Any

import torch
from timm.scheduler import create_scheduler_v2

from timm_igkd.training.settings import TrainingSettings


def create_scheduler(optimizer: torch.optim.Optimizer, settings: TrainingSettings, updates_per_epoch: int) -> Any:
    """Return timm's scheduler for `step_update`, which applies a layer's share of the rate (timm's `lr_scale`), too.

    Warm-up starts at a hundredth of `lr` and leaves at least the last epoch to the schedule. "triangular" rises to
    `lr` over the warm-up and falls in a straight line to `min_lr` over the rest: timm's "poly" of power 1 behind it.
    timm's own "poly" has the power 0.1: it keeps most of `lr` until shortly before the end. "none" is its "constant".
    """
    warmup_epochs = min(settings.warmup_epochs, settings.epochs - 1)
    shape: dict[str, Any] = {"sched": settings.sched, "num_epochs": settings.epochs}
    if settings.sched == "triangular":
        shape = {
            "sched": "poly",
            "num_epochs": settings.epochs - warmup_epochs,
            "decay_rate": 1.0,
            "warmup_prefix": True,
        }
    if settings.sched == "none":
        shape["sched"] = "constant"
    scheduler, _ = create_scheduler_v2(
        optimizer,
        **shape,
        warmup_epochs=warmup_epochs,
        warmup_lr=settings.lr / 100,
        min_lr=settings.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return scheduler
