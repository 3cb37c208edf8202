"""The picture of images beside their maps and overlays."""

import numpy as np
import pytest
from PIL import Image

from timm_igkd.data.images import heat_image
from timm_igkd.errors import InputError
from timm_igkd.overlay.preview import Sample, write_preview


def sample(label, size):
    return Sample(Image.new("RGB", size, "navy"), Image.new("L", size, 128), Image.new("RGB", size, "grey"), label)


def test_preview_grid_has_crisp_pixels(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    write_preview(tmp_path / "grid.png", [Sample(image, image.convert("L"), image, "long label " * 20)] * 5)
    with Image.open(tmp_path / "grid.png") as opened:
        grid = np.asarray(opened)
    enlarged = np.asarray(image).repeat(3, axis=0).repeat(3, axis=1)
    assert np.array_equal(grid[40:136, 20:116], enlarged)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


@pytest.mark.parametrize("size", [(1, 1), (300, 40), (5, 9)])
def test_preview_takes_any_size(tmp_path, size):
    write_preview(tmp_path / "grid.png", [sample("鳥 <b>", size)])
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.format == "PNG"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("p.jpg", "ends in '.jpg'; call it "),
        ("p", "has no suffix; call it "),
        ("p.xyz", "ends in '.xyz'; call it "),
        ("p.png.webp", "ends in '.webp'; call it "),
        (".png", "has no suffix; call it "),
    ],
)
def test_preview_is_no_png_under_another_name(tmp_path, name, why):
    with pytest.raises(InputError, match=rf"a preview is a PNG file, .*{name}' {why}") as raised:
        write_preview(tmp_path / name, [sample("bird", (5, 9))])
    assert list(tmp_path.iterdir()) == []
    write_preview(str(raised.value).split("call it ")[1].strip("'"), [sample("bird", (5, 9))])
    (found,) = tmp_path.iterdir()
    assert found.suffix == ".png"


def test_preview_takes_a_suffix_in_capitals(tmp_path):
    write_preview(tmp_path / "grid.PNG", [sample("bird", (5, 9))])
    assert [path.name for path in tmp_path.iterdir()] == ["grid.PNG"]


def test_preview_needs_samples(tmp_path):
    with pytest.raises(InputError, match="at least one sample"):
        write_preview(tmp_path / "grid.png", [])


def test_heat_grows_brighter():
    ramp = heat_image(Image.fromarray(np.arange(256, dtype=np.uint8)[None]))
    lightness = np.asarray(ramp.convert("L"))[0].astype(int)
    assert (np.diff(lightness) >= 0).all()
