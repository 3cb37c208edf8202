"""Images: a file's pixels as timm decodes them, the key that binds a map to them, and parts of pictures of both."""

import io
import re
import warnings
from collections.abc import Callable

import numpy as np
import xxhash
from PIL import Image, ImageDraw, ImageFont

from timm_igkd.errors import InputError

Name = str | Callable[[], str]
"""How messages call an image; a function is asked only where there is a message."""

_DEEP_MODES = ("I", "F")  # PIL squeezes 16-bit greyscale and float pixels into 8 bits by clipping them
# Raw modes of 16 bits a channel, such as RGB;16B and L;16; in BGR;16 and RGB;16 the three colours share 16.
_DEEP_RAW_MODE = re.compile(r"^.;16|;16[BLN]")
_PNG_HEADER = b"\x89PNG\r\n\x1a\n"

SMALLEST_SIDE = 96
LARGEST_SIDE = 224
# Dark to bright, so that the picture still reads in grey: equal steps of the map are equal steps of lightness.
_HEAT_STOPS = ((0, 0, 4), (51, 16, 104), (122, 28, 109), (188, 55, 84), (237, 105, 37), (252, 180, 24), (252, 255, 164))
DEEP_PIXELS = (
    "{} has {} pixels (16 bits or more), expected 8-bit pixels; "
    "PIL's conversion would clip them: rescale the file to 8 bits"
)


def text(name: Name) -> str:
    """Return a name as text."""
    return name if isinstance(name, str) else name()


def content_key(image: Image.Image) -> str:
    """Return the key that binds a map to its image: xxh3-128 of size and decoded RGB pixels, 32 hex digits.

    Args:
        image: an RGB image (see `decode_image`); equal pixels give equal keys, whatever the file's encoding.
    """
    digest = xxhash.xxh3_128(f"{image.width}x{image.height}:".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def to_rgb(image: Image.Image, name: Name) -> Image.Image:
    """Return `image` as 8-bit RGB, the way timm converts it.

    Raises:
        InputError: 16-bit or float pixels, which PIL's conversion would destroy.
    """
    _refuse_deep(image, name)
    return image if image.mode == "RGB" else image.convert("RGB")


def _refuse_deep(image: Image.Image, name: Name) -> None:
    """Refuse pixels of more than 8 bits; of an image that is decoded already only its mode is left to tell them."""
    if image.mode.startswith(_DEEP_MODES):
        raise InputError(DEEP_PIXELS.format(text(name), image.mode))
    if _loses_bits(image):
        raise InputError(DEEP_PIXELS.format(text(name), "16-bit"))


def _loses_bits(image: Image.Image) -> bool:
    """Return whether Pillow would read 8 of the 16 bits of each of a file's colours, as of a TIFF's or a PPM's."""
    for codec, _, _, arguments in getattr(image, "tile", ()):
        found = arguments if isinstance(arguments, tuple) else (arguments,)
        if any(isinstance(each, str) and _DEEP_RAW_MODE.search(each) for each in found):
            return not image.mode.startswith(_DEEP_MODES)
        if codec.startswith("ppm") and any(isinstance(each, int) and each > 255 for each in found):
            return True
    return False


def _check_size(image: Image.Image, name: Name) -> None:
    """Refuse an image that Pillow would only warn of, before its pixels are decoded."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise InputError(
            f"{text(name)} has {image.width}x{image.height} pixels, expected at most {limit} "
            "(PIL.Image.MAX_IMAGE_PIXELS); make it smaller, or raise the limit for files you trust"
        )


def decode_image(data: bytes, name: Name) -> Image.Image:
    """Decode an image file's bytes to 8-bit RGB without EXIF rotation.

    Raises:
        InputError: not an image, a cut file, pixels of 16 bits, or more of them than Pillow's `Image.MAX_IMAGE_PIXELS`;
            the message begins with `name`.
    """
    return _read_image(data, name, has_pixels=True)


def check_header(data: bytes, name: Name) -> tuple[int, int]:
    """Return an image's (height, width) in pixels, by its header alone.

    Raises:
        InputError: that of `decode_image`, as far as the header tells: all of them but for a cut file.
    """
    image = _read_image(data, name, has_pixels=False)
    return image.height, image.width


def _read_image(data: bytes, name: Name, has_pixels: bool) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below, by the same limit
            image = Image.open(io.BytesIO(data))
        _check_size(image, name)
        if data.startswith(_PNG_HEADER) and data[24:25] == b"\x10":  # bit depth in IHDR
            raise InputError(DEEP_PIXELS.format(text(name), "16-bit"))
        _refuse_deep(image, name)
        if not has_pixels:
            return image
        image.load()
        return to_rgb(image, name)
    except InputError:
        raise
    except Exception as error:  # PIL's plugins raise OSError, SyntaxError, struct.error and more on corrupt files
        raise InputError(f"{text(name)} cannot be decoded as an image ({error}); repair or remove the file") from error


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
