"""Decoding as timm decodes, and the key that binds a map to its image's pixels."""

import io
import os
import struct
import zlib

import datasets
import numpy as np
import pytest
from PIL import Image
from timm.data import ImageDataset
from tiny_parts import noise_image

from timm_igkd import load_labeled_images
from timm_igkd.data.images import content_key, decode_image, to_rgb
from timm_igkd.data.labeled_images import LabeledImages
from timm_igkd.errors import InputError


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def bits_of_timm(path) -> np.ndarray:
    return np.asarray(ImageDataset(str(path.parent.parent))[0][0])


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("PNG", {"compress_level": 0}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {}), ("PPM", {})],
)
def test_key_is_equal_across_lossless_encodings(kind, options):
    image = noise_image(0)
    assert content_key(decode_image(encoded(image, kind, **options), "x")) == content_key(image)


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_key_changes_with_one_level_of_one_pixel(channel):
    pixels = np.asarray(noise_image(0)).copy()
    key = content_key(Image.fromarray(pixels))
    pixels[-1, -1, channel] ^= 1
    assert content_key(Image.fromarray(pixels)) != key


def test_key_tells_sizes_of_equal_bytes_apart():
    flat = np.arange(48, dtype=np.uint8)
    keys = {content_key(Image.fromarray(flat.reshape(h, w, 3))) for h, w in ((4, 4), (2, 8), (8, 2), (16, 1), (1, 16))}
    assert len(keys) == 5


def test_key_is_32_hex_digits():
    key = content_key(noise_image(0))
    assert len(key) == 32
    assert int(key, 16) >= 0


def test_exif_rotation_is_ignored():
    image = noise_image(0, width=8, height=4)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    decoded = decode_image(encoded(image, "PNG", exif=exif), "x")
    assert decoded.getexif()[0x0112] == 6
    assert decoded.size == (8, 4)
    assert content_key(decoded) == content_key(image)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm's folder reader leaves its files open
def test_jpeg_with_exif_rotation_equals_timms_pixels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    path = tmp_path / "class" / "rotated.jpg"
    path.parent.mkdir()
    path.write_bytes(encoded(noise_image(0, 24, 16), "JPEG", exif=exif))
    np.testing.assert_array_equal(np.asarray(decode_image(path.read_bytes(), "x")), bits_of_timm(path))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm's folder reader leaves its files open
@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("L", "png"),
        ("LA", "png"),
        ("RGBA", "png"),
        ("P", "png"),
        ("1", "png"),
        ("CMYK", "jpg"),
        ("L", "jpg"),
        ("P", "gif"),
    ],
)
def test_mode_is_converted_as_timm_does(tmp_path, mode, suffix):
    source = noise_image(1).convert("RGBA")
    source.putalpha(noise_image(2).convert("L"))
    path = tmp_path / "class" / f"image.{suffix}"
    path.parent.mkdir()
    (source if mode == "RGBA" else source.convert("RGB").convert(mode)).save(path)
    found = decode_image(path.read_bytes(), "x")
    assert Image.open(path).mode == mode
    assert found.mode == "RGB"
    expected = np.asarray(Image.open(path).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(found), expected)
    if suffix in ("png", "jpg"):  # timm reads no GIF
        np.testing.assert_array_equal(np.asarray(found), bits_of_timm(path))


def test_one_pixel_image_has_a_key():
    image = decode_image(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"), "x")
    assert image.size == (1, 1)
    assert content_key(image) != content_key(Image.new("RGB", (1, 1), (1, 2, 4)))


@pytest.mark.parametrize(
    ("pixels", "mode"),
    [
        (np.full((4, 4), 40000, np.uint16), "I;16"),
        (np.full((4, 4), 40000, np.int32), "I"),
        (np.ones((4, 4), np.float32), "F"),
    ],
)
def test_deep_pixels_are_an_error(pixels, mode):
    data = encoded(Image.fromarray(pixels), "TIFF")
    assert Image.open(io.BytesIO(data)).mode == mode
    with pytest.raises(InputError, match=r"^image 3 has .* pixels \(16 bits or more\), expected 8-bit.*rescale"):
        decode_image(data, "image 3")


def test_16_bit_png_is_an_error():
    data = encoded(Image.fromarray(np.full((4, 4), 40000, np.uint16)), "PNG")
    with pytest.raises(InputError, match="16 bits"):
        decode_image(data, "image 3")


def test_16_bit_pil_image_is_an_error():
    with pytest.raises(InputError, match="image 3 has I;16 pixels"):
        to_rgb(Image.fromarray(np.full((4, 4), 40000, np.uint16)), "image 3")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("part", [0.2, 0.6, 0.95])
def test_cut_file_is_an_error_with_its_name(kind, part):
    data = encoded(noise_image(0, 64, 64), kind)
    with pytest.raises(InputError, match=r"^image 7 \(a\.png\) cannot be decoded as an image .*repair or remove"):
        decode_image(data[: int(part * len(data))], "image 7 (a.png)")


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"BM" + b"\xff" * 60])
def test_other_bytes_are_an_error(data):
    with pytest.raises(InputError, match="image 7 cannot be decoded"):
        decode_image(data, "image 7")


def deep_png(pixels: int = 4, colour_type: int = 2) -> bytes:
    """Return a PNG of 16 bits a channel: colour type 2 is RGB, 0 grey, 6 RGBA."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    row = b"\0" + b"\x12\x34" * channels * pixels
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", pixels, pixels, 16, colour_type, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(row * pixels)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("colour_type", [0, 2, 4, 6])
def test_png_of_16_bits_is_refused_in_every_colour_type(colour_type):
    with pytest.raises(InputError, match=r"image 3 has .* pixels \(16 bits or more\)"):
        decode_image(deep_png(colour_type=colour_type), "image 3")


def test_more_pixels_than_pillows_limit_are_refused_before_decoding(monkeypatch):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1199)
    with pytest.raises(InputError, match="image 3 has 40x30 pixels, expected at most 1199"):
        decode_image(buffer.getvalue(), "image 3")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1200)
    assert decode_image(buffer.getvalue(), "image 3").size == (40, 30)


@pytest.mark.parametrize("kind", ["outside", "dots", "fifo"])
def test_row_that_names_a_file_elsewhere_is_refused_and_never_read(kind, tmp_path):
    noise_image(0).save(tmp_path / "secret.png")
    folder = tmp_path / "images"
    folder.mkdir()
    path = {"outside": tmp_path / "secret.png", "dots": folder / ".." / "secret.png", "fifo": folder / "fifo"}[kind]
    if kind == "fifo":
        os.mkfifo(path)
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["a"])})
    cells = [{"bytes": None, "path": str(path)}]
    table = datasets.Dataset.from_dict({"image": cells, "label": [0]}, features)
    images = LabeledImages(table, "images", "train", class_names=("a",), roots=[str(folder)])
    with pytest.raises(InputError, match=r"image 0 .* names .*(outside of its dataset's folder|no regular file)"):
        images.read(0)


def test_links_below_the_folder_are_followed(tmp_path):
    noise_image(0).save(tmp_path / "elsewhere.png")
    folder = tmp_path / "images" / "train"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        (folder / name / "0.png").symlink_to(tmp_path / "elsewhere.png")
    assert load_labeled_images(str(tmp_path / "images"), "train")[0][0].size == noise_image(0).size


@pytest.mark.parametrize("kind", ["ppm", "tiff"])
def test_colours_of_16_bits_are_refused_in_every_format(kind):
    pixels = np.arange(2 * 2 * 3, dtype=">u2").reshape(2, 2, 3) * 4000
    if kind == "ppm":
        data = b"P6 2 2 65535\n" + pixels.tobytes()
    else:
        tags = [(256, 2), (257, 2), (258, 16), (259, 1), (262, 2), (273, 8), (277, 3), (278, 2), (279, 24)]
        entries = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags)
        data = (
            b"MM\x00\x2a" + struct.pack(">I", 32) + pixels.tobytes() + struct.pack(">H", len(tags)) + entries + bytes(4)
        )
    with pytest.raises(InputError, match="expected 8-bit pixels"):
        decode_image(data, "image 0")


def bitmap_of_16_bits(colours: list[int], masks: tuple[int, int, int]) -> bytes:
    """Return a BMP of one row, whose pixels hold three colours in 16 bits."""
    row = struct.pack(f"<{len(colours)}H", *colours).ljust(-(-len(colours) // 2) * 4, b"\0")
    header = struct.pack("<IiiHHIIiiII3I", 40, len(colours), 1, 1, 16, 3, len(row), 0, 0, 0, 0, *masks)
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(row), 0, 0, 14 + len(header)) + header + row


@pytest.mark.parametrize(
    ("colours", "masks"),
    [
        ([0xF800, 0x07E0, 0x001F], (0xF800, 0x07E0, 0x001F)),  # BGR;16
        ([0x7C00, 0x03E0, 0x001F], (0x7C00, 0x03E0, 0x001F)),  # BGR;15
    ],
)
def test_bitmap_of_three_colours_in_16_bits_is_no_deep_image(colours, masks):
    image = decode_image(bitmap_of_16_bits(colours, masks), "image 0")
    assert np.asarray(image)[0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
