"""What tests of attribution share: images in, maps out, by either engine."""

from typing import Any

import numpy as np
import torch
from tiny_parts import noise_image
from torch import Tensor, nn

from timm_igkd.attribution.engine import FastEngine
from timm_igkd.attribution.options import Attribution, CaptumEngine, IGOptions, TeacherView

FAMILIES = ("test_efficientnet", "test_resnet", "test_vit", "test_convnext")


class Linear(nn.Module):
    """f(x) = W x + c, whose integrated gradients are known."""

    def __init__(self, classes: int = 3, size: int = 6):
        super().__init__()
        torch.manual_seed(0)
        self.num_classes = classes
        self.pretrained_cfg = {"input_size": (3, size, size), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
        self.head = nn.Linear(3 * size * size, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


def images_in(model: nn.Module, count: int, seed: int = 0) -> Tensor:
    view = TeacherView(model)
    return torch.stack([view(noise_image(seed + index, *view.size[::-1])) for index in range(count)])


def attribute(
    name: str,
    model: nn.Module,
    inputs: Tensor,
    baselines: Tensor,
    targets: Tensor,
    chunk_size: int = 16,
    **options: Any,
) -> Attribution:
    settings = IGOptions(**options)
    engine: Any
    if name == "captum":
        engine = CaptumEngine(model, settings, chunk_size)
    else:
        engine = FastEngine(model, settings, chunk_size, tuple(inputs.shape[1:]))
    with torch.no_grad():
        logits = model(inputs)
    return engine.attribute(inputs, baselines, targets, logits)


def largest_differences(found: Tensor, expected: Tensor) -> np.ndarray:
    """Return per map the largest difference, in units of the expected map's largest value."""
    found, expected = found.double(), expected.double()
    return ((found - expected).abs().amax((1, 2)) / expected.abs().amax((1, 2))).numpy()
