"""Twelve small images with ramps as maps and logits that name their image."""

from pathlib import Path

import numpy as np
from tiny_parts import ImageList, noise_image, ramp, write_store

from timm_igkd import IGOverlay, MapStore
from timm_igkd.overlay.device_images import DeviceImages, StoredMaps, load_images

N, SIZE = 12, 16
ALWAYS = IGOverlay(overlay_prob=1.0)
Parts = tuple[ImageList, MapStore]


def create_parts(folder: Path) -> Parts:
    """Return the images and their store."""
    images = ImageList([noise_image(seed, SIZE, SIZE) for seed in range(N)], [seed % 3 for seed in range(N)])
    logits = [np.full(3, seed, dtype=np.float32) for seed in range(N)]
    maps = [ramp(index, SIZE, SIZE) for index in range(N)]
    return images, write_store(folder / "maps", images, maps, logits=logits)


def load_parts(parts: Parts) -> DeviceImages:
    """Return the same in memory."""
    dataset, store = parts
    images = load_images(dataset)
    stored = StoredMaps(store, dataset, images)
    return DeviceImages(images.images, images.labels, stored.maps("aligned", 0), stored.logits())
