"""Gradients that are scaled, as those of fp16 are: trainings begin alike, and one without any update is an error."""

import pytest
import torch
from accelerate import Accelerator
from training_parts import create_trainer

from timm_igkd.errors import DivergedError
from timm_igkd.models.loading import weights_hash


def scaled(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> torch.amp.GradScaler:
    """Have an accelerator scale gradients; fp16 itself needs a GPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    monkeypatch.setattr(accelerator, "scaler", scaler)
    return scaler


def test_trainings_that_share_an_accelerator_begin_with_one_scale(accelerator, monkeypatch):
    scaler = scaled(accelerator, monkeypatch)
    weights = []
    for _ in range(2):
        trainer = create_trainer(accelerator, teacher=False)
        assert scaler.get_scale() == 4.0
        trainer.fit()
        assert scaler.get_scale() > 4.0
        weights.append(weights_hash(trainer.final_model()))
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("epochs", "named"), [(1, 0), (9, 1)])
def test_a_training_whose_updates_are_all_left_out_is_an_error(accelerator, monkeypatch, epochs, named):
    scaled(accelerator, monkeypatch)
    trainer = create_trainer(accelerator, teacher=False, epochs=epochs, batch_size=12)  # two steps an epoch
    next(iter(trainer.task.trainable_module.parameters())).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(
        DivergedError, match=f"infinite in epoch {named} at every scale of fp16, so its weights"
    ) as error:
        trainer.fit()
    assert error.value.epoch == named
