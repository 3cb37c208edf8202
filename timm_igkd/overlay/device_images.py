"""A data set of small images that fits into the memory of a device, with each image's map and teacher logits.

Decoded and checked once; device_views.py makes training views of it.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from timm_igkd.data.items import dataset_name, read_item, refuse_overlaid, row_name
from timm_igkd.errors import InputError
from timm_igkd.maps.store import MapStore
from timm_igkd.overlay.controls import OverlaySource, control_map


class SeveralSizesError(InputError):
    """Images of several sizes, which cannot share a tensor."""


@dataclass(frozen=True)
class DeviceImages:
    """Images of one size, with what belongs to each.

    Attributes:
        images: [N, 3, H, W] uint8 RGB.
        labels: [N] int64.
        maps: [N, 1, H, W] uint8 maps to overlay, or None.
        logits: [N, classes] float32, the teacher's for each clean image, or None.
    """

    images: Tensor
    labels: Tensor
    maps: Tensor | None = None
    logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> "DeviceImages":
        """Return the images at `indices`, [n] int64, in that order."""
        index = indices.to(self.labels.device)
        return DeviceImages(*(None if part is None else part[index] for part in self._parts()))  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> "DeviceImages":
        """Return the same on another device."""
        return DeviceImages(*(None if part is None else part.to(device) for part in self._parts()))  # type: ignore[arg-type]

    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.images, self.labels, self.maps, self.logits


def load_images(dataset: Any) -> DeviceImages:
    """Decode all images of a map-style dataset of (PIL image, label).

    Raises:
        SeveralSizesError: they have more than one size.
        InputError: there are none, one cannot be read, or they are overlaid already.
    """
    refuse_overlaid(dataset)
    if len(dataset) == 0:
        raise InputError(f"{dataset_name(dataset)!r} has no images, expected at least one")
    pixels: np.ndarray | None = None
    labels = torch.empty(len(dataset), dtype=torch.int64)
    for index in range(len(dataset)):
        image, label = read_item(dataset, index)
        if pixels is None:
            pixels = np.empty((len(dataset), image.height, image.width, 3), dtype=np.uint8)
        if (image.height, image.width) != pixels.shape[1:3]:
            raise SeveralSizesError(
                f"{row_name(dataset, index)} is {image.width}x{image.height}, the first image is "
                f"{pixels.shape[2]}x{pixels.shape[1]}; the fast path holds images of one size: resize them, or use "
                "IGOverlayDataset with a loader"
            )
        pixels[index], labels[index] = np.asarray(image), label
    return DeviceImages(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels)


class StoredMaps:
    """A store decoded into memory, each image of a dataset checked against its own row once.

    Args:
        store: maps of the dataset.
        dataset: map-style dataset of (PIL image, label).
        images: the same dataset's images, as `load_images` returns them.

    Raises:
        InputError: an image without a map of its own.
    """

    def __init__(self, store: MapStore, dataset: Any, images: DeviceImages):
        self._images, self._labels = images.images, images.labels.tolist()
        self._rows = [
            store.find(F.to_pil_image(image), int(label), index, functools.partial(row_name, dataset, index))
            for index, (image, label) in enumerate(zip(images.images, images.labels, strict=True))
        ]
        self._store, self._dataset = store, dataset

    def __len__(self) -> int:
        return len(self._store)

    @functools.cached_property
    def _maps(self) -> list[Image.Image]:
        return [self._store.overlay_map(row) for row in range(len(self))]

    def overlay_map(self, row: int) -> Image.Image:
        """Return a row's map, as `MapStore.overlay_map` does."""
        return self._maps[row]

    def maps(self, source: OverlaySource, seed: int) -> Tensor:
        """Return what each image is overlaid with, [N, 1, H, W] uint8 (see controls.py)."""
        self._store.require_maps()
        height, width = self._images.shape[2:]
        found = np.empty((len(self._rows), height, width), dtype=np.uint8)
        for index, row in enumerate(self._rows):
            found[index] = np.asarray(control_map(self, row, F.to_pil_image(self._images[index]), source, seed))
        return torch.from_numpy(found)[:, None]

    def logits(self) -> Tensor:
        """Return the teacher's logits of each clean image, [N, classes] float32; see `MapStore.require_logits`."""
        self._store.require_logits(self._dataset)
        labels = self._labels if self._store.labels_decide(self._dataset) else [None] * len(self._labels)
        names = (functools.partial(row_name, self._dataset, index) for index in range(len(self._rows)))
        found = [self._store.logits(*each) for each in zip(self._rows, labels, names, strict=True)]
        return torch.from_numpy(np.stack(found))


def derange_logits(data: DeviceImages, rows: Tensor) -> DeviceImages:
    """Return the images with the logits of the images at `rows`, [N] int64."""
    if data.logits is None:
        raise InputError("shuffled logits need stored logits, got none; build the maps with --logits")
    return replace(data, logits=data.logits[rows.to(data.logits.device)])
