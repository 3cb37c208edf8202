"""Settings of the optimisation are checked in one place."""

import math
from typing import Any

import numpy as np
import pytest
from timm.optim import list_optimizers

from timm_igkd.errors import InputError, InputTypeError
from timm_igkd.training.settings import COMMON_OPTIMISERS, TrainingSettings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"grad_accum_steps": 0}, "grad_accum_steps must be at least 1"),
        ({"epochs": 1.5}, "epochs must be a whole number, got 1.5"),
        ({"warmup_epochs": 0.5}, "warmup_epochs must be a whole number, got 0.5"),
        ({"lr": 1e-6, "min_lr": 1e-5}, "min_lr 1e-05 is above lr 1e-06, and the rate would rise to it"),
        ({"layer_decay": 1.5}, r"layer_decay must be in \(0, 1\], got 1.5"),
        ({"compile_mode": "fast"}, "compile_mode must be one of none, default"),
        ({"sched": ["cosine"]}, r"sched must be one of .*, got \['cosine'\]"),
        ({"lr": -1.0}, "lr must be in"),
        ({"lr": math.inf}, "lr must be in"),
        ({"weight_decay": math.nan}, "weight_decay must be in"),
        ({"model_ema_decay": 1.5}, "model_ema_decay must be in"),
        ({"clip_grad": 0.0}, "clip_grad must be above 0 and finite, got 0"),
        ({"sched": "cosin"}, r"sched must be one of .*did you mean 'cosine'"),
        ({"opt": "adamx"}, r"unknown optimiser 'adamx' \(did you mean"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainingSettings(**{"epochs": 1} | settings)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("epochs", "3"), ("epochs", True), ("seed", "a"), ("layer_decay", "x"), ("clip_grad", "x"), ("opt", 5)],
)
def test_a_setting_of_another_kind_is_refused(name: str, wrong: object) -> None:
    with pytest.raises(InputTypeError, match=f"^{name} must be .*, got {type(wrong).__name__}; "):
        TrainingSettings(**{"epochs": 1} | {name: wrong})


def test_whole_numbers_of_numpy_become_pythons() -> None:
    settings = TrainingSettings(epochs=np.int64(3), seed=np.uint8(7))
    assert (type(settings.epochs), type(settings.seed)) == (int, int)
    assert settings == TrainingSettings(epochs=3, seed=7)


def test_a_constant_rate_has_no_last_one() -> None:
    assert TrainingSettings(epochs=1, lr=1e-6, sched="none", min_lr=1e-5).lr == 1e-6


def test_optimisers_that_are_taken_unasked_are_timms() -> None:
    assert {*COMMON_OPTIMISERS} <= {*list_optimizers()}


def test_an_optimiser_of_second_order_is_refused():
    with pytest.raises(InputError, match="'adahessian' needs gradients of gradients"):
        TrainingSettings(epochs=1, opt="adahessian")
