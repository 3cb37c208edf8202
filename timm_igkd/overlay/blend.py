"""The paper's overlay: a training image blended with the teacher's attribution map of that same image."""

import functools
import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
from PIL import Image, ImageChops

from timm_igkd.errors import InputError, check_kind, check_range

if TYPE_CHECKING:  # the command line reads the defaults here, without torch
    from torch import Tensor

OverlaySource = Literal["aligned", "shuffled", "permuted", "noise", "blank", "sobel"]
"""Which maps are overlaid: the images' own, or a control (controls.py)."""

_LEVELS = np.arange(256)
_BLOCK_ROWS = 32  # of a photograph: what is blended at a time stays in the processor's cache


def blend_map(image: "Tensor", attribution: "Tensor", weight: float = 0.5, power: "float | Tensor" = 1.0) -> "Tensor":
    """Blend an attribution map into an image; the reference for `IGOverlay`'s 8-bit path.

    Args:
        image: (*, 3, H, W) float RGB in [0, 1], before normalisation.
        attribution: (*, 1, H, W) in [0, 1], in the coordinates of `image`.
        weight: share of the map, in [0, 1]; 0 returns the image.
        power: exponent of the map, before its min-max per image, one for all or (*, 1, 1, 1). A constant map becomes
            zeros, not NaN.

    Returns:
        (*, 3, H, W) in [0, 1], dtype and device of `image`.

    Raises:
        InputError: weight outside [0, 1].

    Source: arXiv 2506.14440, overlay step: `0.5 * image + 0.5 * minmax(map ** s)`. The released code divides a constant
        map by zero.
    """
    check_range("overlay_weight", weight, 0, 1)
    if weight == 0:
        return image
    levels = attribution.to(image.dtype)
    # asked of the map itself: `pow` can give equal neighbours results one ulp apart, which min-max would stretch
    is_constant = levels.amin((-2, -1), keepdim=True) == levels.amax((-2, -1), keepdim=True)
    powered = levels**power
    low, high = powered.amin((-2, -1), keepdim=True), powered.amax((-2, -1), keepdim=True)
    has_span = ~is_constant & (high > low)
    span = (high - low).where(has_span, 1)
    scaled = ((powered - low) / span).where(has_span, 0)
    return (1 - weight) * image + weight * scaled


@dataclass(frozen=True)
class IGOverlay:
    """The settings of the overlay, and its fast path on 8-bit images.

    Attributes:
        overlay_prob: probability that an image is overlaid, in [0, 1].
        overlay_weight: share of the map in the blend, in [0, 1].
        max_power: the map's exponent is exp(U(ln 1, ln max_power)), at least 1.

    Source: arXiv 2506.14440 with p 0.1, weight 0.5, exponents up to 2.
    """

    overlay_prob: float = 0.1
    overlay_weight: float = 0.5
    max_power: float = 2.0

    def __post_init__(self) -> None:
        check_range("overlay_prob", self.overlay_prob, 0, 1)
        check_range("overlay_weight", self.overlay_weight, 0, 1)
        check_range("max_power", self.max_power, 1, sys.float_info.max)

    def power(self, uniform: float) -> float:
        """Return the map's exponent for a uniform number in [0, 1)."""
        return math.exp(uniform * math.log(self.max_power))

    def apply(self, image: Image.Image, attribution: Image.Image, power: float) -> Image.Image:
        """Blend a stored map into an image, within one level of 255 of `blend_map`.

        Args:
            image: 8-bit RGB.
            attribution: 8-bit greyscale, non-negative (a signed map is rectified by the store); resized to the image
                when it is smaller or larger, for it always covers the whole image.
            power: exponent, at least 1, see `power`.

        Returns:
            8-bit RGB of the image's size; a constant map counts as zeros.

        Raises:
            InputTypeError: no PIL image. InputError: an image or a map of another mode, or a power below 1.
        """
        for name, given in (("image", image), ("attribution", attribution)):
            check_kind(name, given, Image.Image, "a PIL image", "make one with Image.fromarray")
        check_range("power", power, 1, sys.float_info.max)
        if image.mode != "RGB":
            raise InputError(f"overlays need 8-bit RGB images, got mode {image.mode!r}; give image.convert('RGB')")
        if attribution.mode != "L":
            raise InputError(f"a map must be an 8-bit greyscale image (mode 'L'), got mode {attribution.mode!r}")
        if attribution.size != image.size:
            attribution = attribution.resize(image.size, Image.Resampling.BILINEAR)
        low, high = cast(tuple[int, int], attribution.getextrema())
        map_table = _map_table(low, high, power, self.overlay_weight)
        if self.overlay_weight == 0.5:
            return _blend_halves(image, attribution, map_table)
        levels, pixels = np.asarray(attribution), np.asarray(image)
        blended = np.empty_like(pixels)
        for start in range(0, len(pixels), _BLOCK_ROWS):
            rows = slice(start, start + _BLOCK_ROWS)
            blended[rows] = _blend_levels(pixels[rows], map_table.take(levels[rows]), self.overlay_weight)
        return Image.fromarray(blended)


def _blend_halves(image: Image.Image, attribution: Image.Image, map_table: np.ndarray) -> Image.Image:
    """Return what `_blend_levels` does for a weight of 0.5, by a fraction of the work.

    The image adds 128 v of 256 to a level and the map m, so that (128 v + m + 128) >> 8 = (v + (m >> 7) + 1) >> 1.
    """
    inverse = attribution.point((256 - (map_table >> 7)).tolist()).convert("RGB")  # 255 - (m >> 7)
    return ImageChops.subtract(image, inverse, 2.0, 128)


def _blend_levels(pixels: np.ndarray, overlay: np.ndarray, weight: float) -> np.ndarray:
    """Return the blend of [h, w, 3] uint8 pixels and what the map adds, [h, w] uint16; uint16 below 256."""
    total = np.empty(pixels.shape, np.uint16)
    for channel in range(3):  # several times faster than broadcasting over three interleaved channels
        total[..., channel] = overlay
    total += _image_table(weight).take(pixels)
    total >>= 8
    return total


def _map_table(low: int, high: int, power: float, weight: float) -> np.ndarray:
    """Return what each map level adds to the blend, in 1/256 levels, with the half level that rounds, [256] uint16."""
    table = np.full(256, 128, np.uint16)  # 65,280 + 128 still fits 16 bits
    if high > low:  # in units of `high`, whose power is 1 and cannot underflow; the min-max cancels the unit
        powered = (_LEVELS[low : high + 1] / high) ** power
        table[low : high + 1] += np.round((powered - powered[0]) / (1 - powered[0]) * (weight * 255 * 256)).astype(
            np.uint16
        )
    return table


@functools.lru_cache(maxsize=8)
def _image_table(weight: float) -> np.ndarray:
    """Return what each image level adds to the blend, in 1/256 levels, [256] uint16."""
    return np.round(np.arange(256) * ((1 - weight) * 256)).astype(np.uint16)
