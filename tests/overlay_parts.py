"""Overlaid data sets of ramps and noise, and what loaders make of them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from timm.data import create_loader, create_transform
from tiny_parts import ImageList

from timm_igkd.maps.store import MapStore
from timm_igkd.overlay.blend import IGOverlay
from timm_igkd.overlay.dataset import IGOverlayDataset

N, SIZE = 12, 32

EXACT = IGOverlay(overlay_prob=1, max_power=1)  # exponent 1: an image that equals its map does not change by a level

ALWAYS = IGOverlay(overlay_prob=1)

NEVER = IGOverlay(overlay_prob=0)

PIPELINES: dict[str, dict[str, Any]] = {
    "crop and flip": {"scale": (0.3, 1.0), "hflip": 0.5, "vflip": 0.5, "color_jitter": None},
    "colour jitter and blur": {"color_jitter": 0.4, "gaussian_blur_prob": 0.5, "grayscale_prob": 0.3},
    "RandAugment": {"auto_augment": "rand-m9-mstd0.5-inc1"},
    "AugMix": {"auto_augment": "augmix-m5-w4-d2"},
    "AutoAugment": {"auto_augment": "original-mstd0.5"},
    "random erasing": {"re_prob": 0.9, "re_mode": "pixel", "re_count": 2},
}


def pipeline(name: str) -> Callable:
    return create_transform(24, is_training=True, use_prefetcher=False, **PIPELINES[name])


def wrap(parts: tuple[ImageList, MapStore], overlay: IGOverlay, transform: Callable | None = None, **options: Any):
    options.setdefault("seed", 0)
    dataset = IGOverlayDataset(*parts, overlay, **options)
    dataset.transform = transform
    return dataset


def images_of(dataset) -> torch.Tensor:
    views = [dataset[index][0] for index in range(len(dataset))]
    return torch.stack([view if isinstance(view, torch.Tensor) else torch.from_numpy(np.array(view)) for view in views])


def loader_of(dataset, **options: Any):
    defaults = {"input_size": (3, 24, 24), "batch_size": 4, "is_training": True, "num_workers": 0}
    return create_loader(dataset, **defaults | {"device": torch.device("cpu"), "persistent_workers": False} | options)


def error_of_worker(loader) -> Exception | None:
    iterator = iter(loader)
    try:
        next(iterator)
    except Exception as error:
        error.__traceback__ = None  # it holds the iterator, which torch closes in 5 seconds when it is found by gc
        return error
    return None
