"""Show images beside their maps and the overlaid result, as a picture drawn with PIL alone."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from timm_igkd.data.images import fit_image, heat_image, shorten
from timm_igkd.data.items import class_names, known_labels, read_item, row_name
from timm_igkd.data.labels import UNLABELED, evenly_spread, readable_names
from timm_igkd.errors import InputError
from timm_igkd.files import given_path, write_atomic
from timm_igkd.maps.store import MapStore
from timm_igkd.overlay.blend import IGOverlay

_COLUMNS = 4  # cells in a row
_PANELS = ("image", "map", "overlaid")
_BACKGROUND, _INK, _MUTED = (255, 255, 255), (29, 31, 35), (102, 108, 117)
_GAP, _MARGIN, _LABEL_HEIGHT, _FONT_SIZE = 4, 20, 20, 13


@dataclass(frozen=True)
class Sample:
    """One training image with what the overlay does to it.

    Attributes:
        image: RGB.
        map: attribution as greyscale ("L"), of any size: it covers the whole image.
        overlaid: RGB, the image the student sees.
        label: the class in words.
    """

    image: Image.Image
    map: Image.Image
    overlaid: Image.Image
    label: str


def overlay_samples(store: MapStore, dataset: Any, count: int) -> list[Sample]:
    """Return evenly spread images beside their maps and overlays (weight 0.5, exponent 1)."""
    names, samples = readable_names(class_names(dataset) or ()), []
    total, labels = min(len(store), len(dataset)), known_labels(dataset)
    for index in evenly_spread(total, count, None if labels is None else labels[:total]):
        image, label = read_item(dataset, index)
        levels = store.overlay_map(store.find(image, label, index, row_name(dataset, index)))
        blended = IGOverlay().apply(image, levels, 1.0)
        word = "no label" if label == UNLABELED else names[label] if names else str(label)
        samples.append(Sample(image, levels, blended, word))
    return samples


def sample_panels(sample: Sample) -> tuple[Image.Image, Image.Image, Image.Image]:
    """Return image, heat-coloured map and overlaid image at one size for display."""
    image = fit_image(sample.image)
    heat = heat_image(sample.map)
    if heat.size != sample.image.size:
        heat = heat.resize(sample.image.size, Image.Resampling.BILINEAR)
    return image, fit_image(heat), fit_image(sample.overlaid)


def check_picture_name(path: str | Path) -> None:
    """Raise InputError for the name of a picture that is no PNG's: it would say another format than the file has."""
    suffix = given_path("a preview", path).suffix
    if suffix.lower() != ".png":
        found = f"ends in {suffix!r}" if suffix else "has no suffix"
        name = str(Path(path).with_suffix(".png")) if Path(path).name else "grid.png"
        raise InputError(f"a preview is a PNG file, {str(path)!r} {found}; call it {name!r}")


def write_preview(path: str | Path, samples: Sequence[Sample]) -> None:
    """Write a PNG grid, each cell an image, its map and the overlaid image above the label.

    Args:
        path: the PNG file, whose name ends in .png; it is replaced in one step.
        samples: in reading order.

    Raises:
        InputError: no samples, or another suffix.
    """
    check_picture_name(path)
    if not samples:
        raise InputError("a preview needs at least one sample, got none; raise the limit")
    columns = min(_COLUMNS, len(samples))
    cells = [sample_panels(sample) for sample in samples]
    side_x = max(panel.width for cell in cells for panel in cell)
    side_y = max(panel.height for cell in cells for panel in cell)
    width, height = 3 * side_x + 2 * _GAP, side_y + _LABEL_HEIGHT
    rows = -(-len(samples) // columns)
    grid = Image.new(
        "RGB",
        (_MARGIN + columns * (width + _MARGIN), _MARGIN + _LABEL_HEIGHT + rows * (height + _MARGIN)),
        _BACKGROUND,
    )
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(_FONT_SIZE)
    for number, (sample, cell) in enumerate(zip(samples, cells, strict=True)):
        row, column = divmod(number, columns)
        left = _MARGIN + column * (width + _MARGIN)
        top = _MARGIN + _LABEL_HEIGHT + row * (height + _MARGIN)
        for panel, (name, image) in enumerate(zip(_PANELS, cell, strict=True)):
            x = left + panel * (side_x + _GAP)
            grid.paste(image, (x + (side_x - image.width) // 2, top + (side_y - image.height) // 2))
            if row == 0:
                draw.text((x, _MARGIN - 4), name, _MUTED, font)
        draw.text((left, top + side_y + 3), shorten(sample.label, draw, font, width), _INK, font)
    buffer = io.BytesIO()
    grid.save(buffer, format="PNG")
    write_atomic(Path(path), buffer.getvalue())
