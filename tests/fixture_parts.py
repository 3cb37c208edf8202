"""What fixtures and the tests that use them name alike."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

ImageFactory = Callable[..., Path]
HUB_TOKEN = "hf_" + "TestTokenOfNobody0" * 2


def tiny_image(index: int, label: int, size: int, seed: int) -> Image.Image:
    """Return noise around a colour of the class: images differ, classes can be learnt."""
    colour = np.random.default_rng([seed, 1, label]).integers(40, 216, size=3)
    noise = np.random.default_rng([seed, 2, index]).integers(-40, 41, size=(size, size, 3))
    return Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8))
