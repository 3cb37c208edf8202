"""Settings of the optimisation are checked in one place."""

import math
from typing import Any

import pytest
from timm.optim import list_optimizers

from timm_igkd.errors import InputError
from timm_igkd.training.settings import COMMON_OPTIMISERS, TrainingSettings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"grad_accum_steps": 0}, "grad_accum_steps must be at least 1"),
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


def test_optimisers_that_are_taken_unasked_are_timms() -> None:
    assert {*COMMON_OPTIMISERS} <= {*list_optimizers()}


def test_an_optimiser_of_second_order_is_refused():
    with pytest.raises(InputError, match="'adahessian' needs gradients of gradients"):
        TrainingSettings(epochs=1, opt="adahessian")
