"""Images with maps that tell at once where a map went."""

import numpy as np
import pytest
from overlay_parts import SIZE, N
from PIL import Image
from tiny_parts import ImageList, noise_image, ramp, write_store

from timm_igkd.maps.store import MapStore


@pytest.fixture(scope="module")
def ramps(tmp_path_factory) -> tuple[ImageList, MapStore]:
    """Images that equal their own maps, each a ramp of another direction."""
    images = [Image.fromarray(ramp(index, SIZE, SIZE)).convert("RGB") for index in range(N)]
    dataset = ImageList(images, [index % 3 for index in range(N)], name="ramps")
    folder = tmp_path_factory.mktemp("ramps")
    return dataset, write_store(folder, dataset, [ramp(index, SIZE, SIZE) for index in range(N)])


@pytest.fixture(scope="module")
def noisy(tmp_path_factory) -> tuple[ImageList, MapStore]:
    """Noise images with ramps as maps, so that an overlay changes every image."""
    dataset = ImageList([noise_image(seed, SIZE, SIZE) for seed in range(N)], [i % 3 for i in range(N)], name="noise")
    logits = [np.arange(3, dtype=np.float32) + index for index in range(N)]
    folder = tmp_path_factory.mktemp("noise")
    return dataset, write_store(folder, dataset, [ramp(index, SIZE, SIZE) for index in range(N)], logits=logits)
