"""Models in eval mode meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def eval_mode(*models: nn.Module, device: torch.device | str | None = None) -> Iterator[None]:
    """Put models into eval mode, on `device` where one is given; give all their modules their own mode and device back.

    `model.train(was_training)` would not do: a model that trains may hold batch norms that were frozen in eval mode.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    homes = [next((parameter.device for parameter in model.parameters()), None) for model in models]
    try:
        for model in models:
            model.eval() if device is None else model.to(device).eval()
        yield
    finally:
        for model, home in zip(models, homes, strict=True):
            if device is not None and home is not None:
                model.to(home)
        for module, training in modes:
            module.training = training
