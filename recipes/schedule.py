"""The learning rate over a training, by timm's schedulers, stepped at every update."""

from typing import Any

import torch
from timm.scheduler import create_scheduler_v2


def create_scheduler(
    optimizer: torch.optim.Optimizer,
    sched: str,
    *,
    lr: float,
    epochs: int,
    updates_per_epoch: int,
    warmup_epochs: int = 0,
    min_lr: float = 0.0,
) -> Any:
    """Return timm's scheduler for `step_update`, or None where the rate stays as it is (`sched` "none").

    Warm-up starts at a hundredth of `lr` and leaves at least the last epoch to the schedule.
    """
    if sched == "none":
        return None
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=sched,
        num_epochs=epochs,
        warmup_epochs=min(warmup_epochs, epochs - 1),
        warmup_lr=lr / 100,
        min_lr=min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return scheduler
