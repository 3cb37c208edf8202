"""What an overlay's effect must be compared with: maps that are not the image's own, or no maps at all.

Every control first finds the image's own row, so that wrong data is an error in the controls too; then it puts
something else in the map's place. All go through the same exponent and min-max as real maps.
"""

import functools
from typing import Protocol, get_args

import numpy as np
from PIL import Image

from timm_igkd.errors import InputError, check_choice
from timm_igkd.overlay.blend import OverlaySource
from timm_igkd.random_streams import generator


class OverlayMaps(Protocol):
    """Maps by row, such as a MapStore."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def overlay_map(self, row: int) -> Image.Image:
        """Return a row's map, 8-bit greyscale."""


@functools.lru_cache(maxsize=4)
def derangement(n: int, seed: int) -> np.ndarray:
    """Return a random permutation of n rows that leaves none in place (a random cycle), [n] int64."""
    if n < 2:
        raise InputError(f"overlay source 'shuffled' needs at least 2 maps, the store has {n}")
    order = generator(seed, "derangement").permutation(n)
    shuffled = np.empty(n, dtype=np.int64)
    shuffled[order] = np.roll(order, 1)
    return shuffled


def control_map(maps: OverlayMaps, row: int, image: Image.Image, source: OverlaySource, seed: int) -> Image.Image:
    """Return the map to overlay.

    Args:
        maps: such as a MapStore.
        row: the image's own row.
        image: 8-bit RGB, untransformed.
        source: "aligned": its own map. "shuffled": another image's, one fixed derangement per seed (the released code's
            behaviour). "permuted": its own, at the image's size, with the pixels permuted (same histogram, no
            structure). "noise": uniform.
            "blank": zeros, which only darkens. "sobel": the image's own edges.
        seed: of "shuffled", "permuted" and "noise".

    Returns:
        8-bit greyscale, at the size of `image`.

    Raises:
        InputError: an unknown source, or "shuffled" of a single map.
    """
    check_choice("overlay_source", source, get_args(OverlaySource))
    if source == "aligned":
        return _at_size_of(image, maps.overlay_map(row))
    if source == "shuffled":
        return _at_size_of(image, maps.overlay_map(int(derangement(len(maps), seed)[row])))
    if source == "blank":
        return Image.new("L", image.size)
    if source == "sobel":
        return sobel(image)
    draws = generator(seed, source, row)
    if source == "permuted":
        # resized before, as every map is: noise that is resized afterwards has another histogram
        levels = np.asarray(_at_size_of(image, maps.overlay_map(row)))
        return Image.fromarray(draws.permutation(levels.ravel()).reshape(levels.shape))
    return Image.fromarray(draws.integers(0, 256, image.size[::-1], dtype=np.uint8))


def _at_size_of(image: Image.Image, levels: Image.Image) -> Image.Image:
    return levels if levels.size == image.size else levels.resize(image.size, Image.Resampling.BILINEAR)


def sobel(image: Image.Image) -> Image.Image:
    """Return the magnitude of the image's luminance gradient, largest value 255, 8-bit greyscale."""
    grey = np.pad(np.asarray(image.convert("L"), dtype=np.float32), 1, mode="edge")
    smooth_rows = grey[:-2] + 2 * grey[1:-1] + grey[2:]
    smooth_columns = grey[:, :-2] + 2 * grey[:, 1:-1] + grey[:, 2:]
    magnitude = np.hypot(smooth_rows[:, 2:] - smooth_rows[:, :-2], smooth_columns[2:] - smooth_columns[:-2])
    peak = magnitude.max()
    return Image.fromarray(np.round(magnitude * (255 / peak) if peak > 0 else magnitude).astype(np.uint8))
