"""How a task is optimised: what the trainer needs to know, whatever makes its batches."""

import sys
from dataclasses import dataclass
from typing import Literal, get_args

from timm_igkd.errors import (
    InputError,
    check_choice,
    check_count,
    check_kind,
    check_number,
    check_range,
    check_whole,
    nearest,
)

COMMON_OPTIMISERS = ("adam", "adamw", "momentum", "sgd")  # timm's, known without asking it, so without its import
SCHEDULES = ("cosine", "tanh", "poly", "triangular", "none")
CompileMode = Literal["none", "default", "reduce-overhead", "max-autotune"]
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
        model_ema_decay: its decay, at most.
        model_ema_warmup: the decay rises to that with the updates, timm's 1 - updates ** (-2 / 3): without it, the
            average of a training of few updates is mostly the weights that it began with.
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
    model_ema_warmup: bool = True
    freeze_bn: bool = False
    compile_mode: str = "none"

    def __post_init__(self) -> None:
        for name, low in {"epochs": 1, "grad_accum_steps": 1, "warmup_epochs": 0}.items():
            object.__setattr__(self, name, check_count(name, getattr(self, name), low))
        object.__setattr__(self, "seed", check_whole("seed", self.seed))
        for name in ("lr", "weight_decay", "momentum", "min_lr"):
            check_range(name, getattr(self, name), 0, sys.float_info.max)
        check_range("model_ema_decay", self.model_ema_decay, 0, 1)
        for name, most in {"layer_decay": 1.0, "clip_grad": sys.float_info.max}.items():
            if getattr(self, name) is not None:
                _check_above_0(name, getattr(self, name), most)
        check_choice("sched", self.sched, SCHEDULES)
        if self.sched != "none" and self.min_lr > self.lr:
            raise InputError(
                f"min_lr {self.min_lr:g} is above lr {self.lr:g}, and the rate would rise to it; lower min_lr"
            )
        check_choice("compile_mode", self.compile_mode, get_args(CompileMode))
        check_kind("opt", self.opt, str, "the name of a timm optimiser", "timm.optim lists them")
        if self.opt not in COMMON_OPTIMISERS:
            _check_optimizer(self.opt)


def _check_above_0(name: str, value: float, most: float) -> None:
    check_number(name, value)
    if not 0 < value <= most:
        raise InputError(f"{name} must be {'in (0, 1]' if most == 1 else 'above 0 and finite'}, got {value:g}")


def _check_optimizer(opt: str) -> None:
    from timm.optim import get_optimizer_info, list_optimizers  # only here: common settings are read without timm

    names = [str(name) for name in list_optimizers()]
    if opt not in names:
        raise InputError(f"unknown optimiser {opt!r}{nearest(opt, names)}; timm.optim lists them")
    if get_optimizer_info(opt).second_order:
        raise InputError(f"optimiser {opt!r} needs gradients of gradients, which no training here keeps; choose adamw")
