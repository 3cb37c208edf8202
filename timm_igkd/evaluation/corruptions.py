"""Corruptions of images: eight kinds at five severities, made on the fly, the same for the same seed.

Strengths are those of CIFAR-10-C for images of 32 pixels and of ImageNet-C for 224 (Hendrycks & Dietterich, arXiv
1903.12261), by the shorter side. Between the two a strength is interpolated geometrically in the logarithm of the
side; outside it stays, but lengths in pixels (blur, pixelate) go on growing in proportion. Deviations: `brightness`
multiplies by 1 + 2c where they add c to the value of HSV (the same for mid-grey); `gaussian_blur` reflects the image at
its border, where theirs goes on with the border's pixels; values are rounded where they cut the fraction off, but
of `brightness`, where torchvision cuts it off too; `fog` sums octaves of smooth noise, not a diamond-square fractal,
and has 0.75 to 3.5 times the image's range at 224 pixels (theirs, 1.5 to 3, is no further from the clean image at
severity 5 than at 2). `translate` is ours: diagonal, by the same share of the sides at every size, black where nothing
was.
"""

import io
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from timm_igkd.errors import InputError, InputTypeError, check_choice
from timm_igkd.random_streams import generator

SEVERITIES = (1, 2, 3, 4, 5)

_SIDES = (32, 224)
LARGEST_SIDE = _SIDES[1]
"""Shorter side of ImageNet-C's images; strengths other than lengths stay beyond it."""
_LARGEST_KERNEL_RADIUS = 24  # that of 224 pixels at severity 5
_FOG_OCTAVES = 5

Table = tuple[tuple[float, ...], tuple[float, ...]]
_QUALITY: Table = ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7))
_NOISE_SD: Table = ((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38))
_BLUR_SIGMA: Table = ((0.4, 0.6, 0.7, 0.8, 1.0), (1.0, 2.0, 3.0, 4.0, 6.0))
_PIXELS_LEFT: Table = ((0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25))
_CONTRAST: Table = ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05))
_BRIGHTNESS: Table = ((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5))
_FOG: Table = ((0.2, 0.5, 0.75, 1.0, 1.5), (0.75, 1.25, 1.75, 2.5, 3.5))
_FOG_DECAY: Table = ((3.0, 3.0, 2.5, 2.0, 1.75), (2.0, 2.0, 1.7, 1.5, 1.4))
_SHIFT: Table = ((2 / 32, 4 / 32, 5 / 32, 6 / 32, 8 / 32),) * 2

Streams = Iterator[np.random.Generator]
Corruption = Callable[[Tensor, int, Streams], Tensor]


def _strength(table: Table, severity: int, images: Tensor, *, length: bool = False) -> float:
    """Return the strength of a severity for the shorter side of `images`; a `length` is in pixels."""
    side = min(images.shape[-2:])
    inside = min(max(side, _SIDES[0]), _SIDES[1])
    share = math.log(inside / _SIDES[0]) / math.log(_SIDES[1] / _SIDES[0])
    small, large = (row[severity - 1] for row in table)
    return small ** (1 - share) * large**share * (side / inside if length else 1)


def _to_uint8(images: Tensor) -> Tensor:
    """Return (N, 3, H, W) float in [0, 1], clamped, as uint8."""
    return images.mul(255).round_().clamp_(0, 255).to(torch.uint8)


def _jpeg(images: Tensor, severity: int, streams: Streams) -> Tensor:
    quality = round(_strength(_QUALITY, severity, images))
    decoded = [_through_jpeg(image, quality) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous().to(images.device)


def _through_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    """Return (H, W, 3) uint8 pixels as PIL saves and reads them; torchvision's own codec is deprecated since 0.29."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def _gaussian_noise(images: Tensor, severity: int, streams: Streams) -> Tensor:
    noise = np.stack([stream.standard_normal(images.shape[1:], dtype=np.float32) for stream in streams])
    sd = _strength(_NOISE_SD, severity, images)
    return _to_uint8(images / 255 + sd * torch.from_numpy(noise).to(images.device))


def _gaussian_blur(images: Tensor, severity: int, streams: Streams) -> Tensor:
    sigma = _strength(_BLUR_SIGMA, severity, images, length=True)
    height, width = images.shape[-2:]
    radii = [min(math.ceil(4 * sigma), side - 1) for side in (width, height)]  # reflection needs radius < side
    sizes = [2 * radius + 1 for radius in radii]
    if max(radii) <= _LARGEST_KERNEL_RADIUS:
        return F.gaussian_blur(images, sizes, [sigma, sigma])
    rows = F.gaussian_blur(images.float(), [sizes[0], 1], [sigma, sigma])  # torchvision's kernel is a whole square
    return F.gaussian_blur(rows, [1, sizes[1]], [sigma, sigma]).round_().clamp_(0, 255).to(torch.uint8)


def _pixelate(images: Tensor, severity: int, streams: Streams) -> Tensor:
    """Resize down and up again with PIL's box filter, as the authors do, who cut off the fraction of a side."""
    height, width = images.shape[-2:]
    share = _strength(_PIXELS_LEFT, severity, images) * min(1, _SIDES[1] / min(height, width))
    coarse = max(1, int(width * share)), max(1, int(height * share))
    changed = [
        np.asarray(
            Image.fromarray(pixels).resize(coarse, Image.Resampling.BOX).resize((width, height), Image.Resampling.BOX)
        )
        for pixels in np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy())
    ]
    return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2).contiguous().to(images.device)


def _contrast(images: Tensor, severity: int, streams: Streams) -> Tensor:
    """Scale the distance from each channel's own mean."""
    amount, unit = _strength(_CONTRAST, severity, images), images / 255
    mean = unit.mean(dim=(2, 3), keepdim=True)
    return _to_uint8((unit - mean) * amount + mean)


def _brightness(images: Tensor, severity: int, streams: Streams) -> Tensor:
    return F.adjust_brightness(images, 1 + 2 * _strength(_BRIGHTNESS, severity, images))


def _fog(images: Tensor, severity: int, streams: Streams) -> Tensor:
    amount = _strength(_FOG, severity, images)
    field = _smooth_noise(images, _strength(_FOG_DECAY, severity, images), streams)
    clean = images / 255
    brightest = clean.amax(dim=(1, 2, 3), keepdim=True)
    return _to_uint8((clean + amount * field) * (brightest / (brightest + amount)))


def _smooth_noise(images: Tensor, decay: float, streams: Streams) -> Tensor:
    """Return (N, 1, H, W) float32 noise that spans [0, 1]; each octave is twice as fine and `decay` times weaker."""
    sides = [2 ** (octave + 1) + 1 for octave in range(_FOG_OCTAVES)]
    edges = np.cumsum([side * side for side in sides])
    draws = torch.from_numpy(np.stack([stream.random(edges[-1], dtype=np.float32) for stream in streams]))
    field = torch.zeros((len(images), 1, *images.shape[-2:]), device=images.device)
    for octave, (side, end) in enumerate(zip(sides, edges, strict=True)):
        grid = draws[:, end - side * side : end].reshape(-1, 1, side, side).to(images.device)
        fine = torch.nn.functional.interpolate(grid, images.shape[-2:], mode="bicubic", align_corners=True)
        field += fine / decay**octave
    low, high = field.amin(dim=(2, 3), keepdim=True), field.amax(dim=(2, 3), keepdim=True)
    return (field - low) / (high - low).clamp_min(1e-6)


def _translate(images: Tensor, severity: int, streams: Streams) -> Tensor:
    height, width = images.shape[-2:]
    share = _strength(_SHIFT, severity, images)
    directions = np.stack([stream.choice((-1, 1), 2) for stream in streams])
    shifted = torch.empty_like(images)
    for direction in np.unique(directions, axis=0):
        chosen = torch.from_numpy((directions == direction).all(axis=1)).to(images.device)
        steps = [max(1, round(share * side)) for side in (height, width)]
        top, left = (-int(sign) * step for sign, step in zip(direction, steps, strict=True))
        shifted[chosen] = F.crop(images[chosen], top, left, height, width)  # outside the image a crop is black
    return shifted


CORRUPTIONS: dict[str, Corruption] = {
    "jpeg": _jpeg,
    "gaussian_noise": _gaussian_noise,
    "gaussian_blur": _gaussian_blur,
    "pixelate": _pixelate,
    "contrast": _contrast,
    "brightness": _brightness,
    "fog": _fog,
    "translate": _translate,
}


def corrupt(images: Tensor, kind: str, severity: int, seed: int = 0, *, start: int = 0) -> Tensor:
    """Corrupt images; one is the same in any batch.

    Args:
        images: (N, 3, H, W) uint8 RGB, on any device and of any size.
        kind: one of `CORRUPTIONS`.
        severity: 1 (weak) to 5 (strong).
        seed: of the random kinds `gaussian_noise`, `fog` and `translate`; image i draws from (seed, kind, severity, i).
        start: index i of the first image.

    Returns:
        (N, 3, H, W) uint8 on the device of `images`, which is left as it is. Equal on the same device and versions;
        between devices a value can differ by a rounding.

    Raises:
        InputError: unknown kind, severity outside 1 to 5, other shape.
        InputTypeError: not a uint8 tensor.

    Source: Hendrycks & Dietterich, arXiv 1903.12261; deviations are named at the top of this module.
    """
    check_choice("kind", kind, CORRUPTIONS)
    if not isinstance(severity, int) or severity not in SEVERITIES:
        raise InputError(f"severity must be one of 1, 2, 3, 4, 5, got {severity!r}")
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        found = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise InputTypeError(
            f"images must be a uint8 tensor with values 0 to 255, got {found}; round and convert it first"
        )
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise InputError(
            f"images must have the shape (N, 3, H, W), got {tuple(images.shape)}; add the batch "
            "dimension, or convert to RGB"
        )
    if len(images) == 0:
        return images.clone()
    streams = (generator(seed, f"corruption {kind}", severity, start + i) for i in range(len(images)))
    return CORRUPTIONS[kind](images, severity, streams)
