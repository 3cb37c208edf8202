"""How a task is optimised: what the trainer needs to know, whatever makes its batches."""

import sys
from dataclasses import dataclass
from typing import Literal

from timm_igkd.errors import InputError, check_choice, check_count, check_range, nearest

COMMON_OPTIMISERS = ("adam", "adamw", "momentum", "sgd")  # timm's, known without asking it, so without its import
SCHEDULES = ("cosine", "tanh", "poly", "triangular", "none")
TrainCrop = Literal["none", "pad", "rrc"]
"""What is cut from a training image: see TrainAugmentation."""


@dataclass(frozen=True)
class TrainingSettings:
    """Optimiser, schedule and what goes with them; checked here, for every road that leads to the trainer.

    Attributes:
        epochs: of the training.
        seed: of what the model itself draws, such as dropout.
        opt: a timm optimiser.
        lr: its largest learning rate.
        weight_decay: of the optimiser.
        layer_decay: timm's: the rate of a layer is this share of the next one's; None: one rate for all.
        momentum: of the optimiser, where it has one.
        sched: a timm scheduler, "triangular" (schedule.py), or "none": a constant rate.
        warmup_epochs: of a linear warm-up.
        min_lr: the last learning rate.
        grad_accum_steps: batches per optimiser step; an epoch's last step takes what is left.
        clip_grad: largest gradient norm, or None.
        model_ema: validate and keep an exponential moving average of the weights.
        model_ema_decay: its decay.
        freeze_bn: batch norms normalise by the statistics that they have, and keep them.
        compile_mode: of torch.compile for student and teacher, or "none".
    """

    epochs: int
    seed: int = 0
    opt: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    layer_decay: float | None = None
    momentum: float = 0.9
    sched: str = "cosine"
    warmup_epochs: int = 0
    min_lr: float = 0.0
    grad_accum_steps: int = 1
    clip_grad: float | None = None
    model_ema: bool = False
    model_ema_decay: float = 0.999
    freeze_bn: bool = False
    compile_mode: str = "none"

    def __post_init__(self) -> None:
        for name in ("epochs", "grad_accum_steps"):
            check_count(name, getattr(self, name))
        for name in ("lr", "weight_decay", "momentum", "warmup_epochs", "min_lr"):
            check_range(name, getattr(self, name), 0, sys.float_info.max)
        check_range("model_ema_decay", self.model_ema_decay, 0, 1)
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise InputError(f"layer_decay must be in (0, 1], got {self.layer_decay:g}")
        if self.clip_grad is not None and not 0 < self.clip_grad <= sys.float_info.max:
            raise InputError(f"clip_grad must be above 0 and finite, got {self.clip_grad:g}")
        check_choice("sched", self.sched, SCHEDULES)
        if self.opt not in COMMON_OPTIMISERS:
            _check_optimizer(self.opt)


def _check_optimizer(opt: str) -> None:
    from timm.optim import get_optimizer_info, list_optimizers  # only here: common settings are read without timm

    names = [str(name) for name in list_optimizers()]
    if opt not in names:
        raise InputError(f"unknown optimiser {opt!r}{nearest(opt, names)}; timm.optim lists them")
    if get_optimizer_info(opt).second_order:
        raise InputError(f"optimiser {opt!r} needs gradients of gradients, which no training here keeps; choose adamw")
