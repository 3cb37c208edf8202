"""Parts of pictures of images and maps, drawn with PIL alone."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SMALLEST_SIDE = 96
LARGEST_SIDE = 224
# Dark to bright, so that the picture still reads in grey: equal steps of the map are equal steps of lightness.
_HEAT_STOPS = ((0, 0, 4), (51, 16, 104), (122, 28, 109), (188, 55, 84), (237, 105, 37), (252, 180, 24), (252, 255, 164))


def heat_image(map_image: Image.Image) -> Image.Image:
    """Colour a greyscale map from black through purple and orange to pale yellow."""
    positions = np.linspace(0, 255, len(_HEAT_STOPS))
    channels = [np.interp(np.arange(256), positions, stops) for stops in zip(*_HEAT_STOPS, strict=True)]
    table = np.stack(channels, axis=1).round().astype(np.uint8)
    return Image.fromarray(table[np.asarray(map_image.convert("L"))])


def fit_image(image: Image.Image) -> Image.Image:
    """Scale a small image up by whole pixels and a large one down, so that its longer side suits a page."""
    longer = max(image.size)
    if longer < SMALLEST_SIDE:
        factor = -(-SMALLEST_SIDE // longer)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if longer > LARGEST_SIDE:
        width, height = (max(1, round(side * LARGEST_SIDE / longer)) for side in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS)
    return image


def shorten(
    label: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> str:
    """Cut a label to one line of `width` pixels."""
    label = " ".join(label.split())
    if not isinstance(font, ImageFont.FreeTypeFont):
        label = label.encode("ascii", "replace").decode()
    if draw.textlength(label, font) <= width:
        return label
    while label and draw.textlength(label + "...", font) > width:
        label = label[:-1]
    return label + "..."
