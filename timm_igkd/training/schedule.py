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
    """Return timm's scheduler for `step_update`, or None where the rate never changes: `sched` "none", no warm-up.

    A layer's share of the rate (timm's `lr_scale`) is applied by the scheduler, and here where there is none.

    Warm-up starts at a hundredth of `lr` and leaves at least the last epoch to the schedule. "triangular" rises to
    `lr` over the warm-up and falls in a straight line to `min_lr` over the rest: timm's "poly" of power 1 behind it.
    timm's own "poly" has the power 0.1: it keeps most of `lr` until shortly before the end.
    """
    warmup_epochs = min(warmup_epochs, epochs - 1)
    if sched == "none" and warmup_epochs <= 0:
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
        return None
    shape: dict[str, Any] = {"sched": sched, "num_epochs": epochs}
    if sched == "triangular":
        shape = {"sched": "poly", "num_epochs": epochs - warmup_epochs, "decay_rate": 1.0, "warmup_prefix": True}
    if sched == "none":
        shape = {"sched": "step", "num_epochs": epochs, "decay_epochs": epochs + 1, "decay_rate": 1.0}
    scheduler, _ = create_scheduler_v2(
        optimizer,
        **shape,
        warmup_epochs=warmup_epochs,
        warmup_lr=lr / 100,
        min_lr=min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return scheduler
