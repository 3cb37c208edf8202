"""One image file: its pixels as timm decodes them, and the key that binds a map to them."""

import io
import warnings
from collections.abc import Callable

import xxhash
from PIL import Image

from timm_igkd.errors import InputError

Name = str | Callable[[], str]
"""How messages call an image; a function is asked only where there is a message."""

_DEEP_MODES = ("I", "F")  # PIL squeezes 16-bit greyscale and float pixels into 8 bits by clipping them
_PNG_HEADER = b"\x89PNG\r\n\x1a\n"


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
    if image.mode.startswith(_DEEP_MODES):
        raise InputError(DEEP_PIXELS.format(text(name), image.mode))
    return image if image.mode == "RGB" else image.convert("RGB")


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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below, by the same limit
            image = Image.open(io.BytesIO(data))
        _check_size(image, name)
        if data.startswith(_PNG_HEADER) and data[24:25] == b"\x10":  # bit depth in IHDR; PIL drops half of RGB's bits
            raise InputError(DEEP_PIXELS.format(text(name), "16-bit"))
        image.load()
        return to_rgb(image, name)
    except InputError:
        raise
    except Exception as error:  # PIL's plugins raise OSError, SyntaxError, struct.error and more on corrupt files
        raise InputError(f"{text(name)} cannot be decoded as an image ({error}); repair or remove the file") from error
