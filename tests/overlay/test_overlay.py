"""The paper's overlay: the 8-bit path equals the formula, and its settings are checked."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_parts import noise_image, ramp

from timm_igkd.errors import InputError, InputTypeError
from timm_igkd.overlay.blend import IGOverlay, blend_map

POWERS = (1.0, 1.2, 1.5, 1.9, 2.0)


def tensors(image: Image.Image, levels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).double() / 255
    return pixels, torch.from_numpy(levels)[None].double() / 255


def levels_of(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("weight", [0.0, 0.1, 0.25, 0.5, 0.77, 1.0])
def test_8_bit_path_is_within_one_level_of_the_formula(weight, power):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        width, height = rng.integers(1, 40, 2)
        low, high = np.sort(rng.integers(0, 256, 2))
        levels = rng.integers(low, high + 1, (height, width), dtype=np.uint8)
        image = noise_image(seed, width, height)
        found = levels_of(IGOverlay(overlay_weight=weight).apply(image, Image.fromarray(levels), power))
        expected = 255 * blend_map(*tensors(image, levels), weight, power).permute(1, 2, 0).numpy()
        assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 0.75, 1.0])
def test_a_photograph_is_blended_block_by_block_as_in_one_piece(weight):
    image, levels = noise_image(0, 61, 100), np.random.default_rng(1).integers(0, 256, (100, 61), dtype=np.uint8)
    found = levels_of(IGOverlay(overlay_weight=weight).apply(image, Image.fromarray(levels), 1.4))
    low, span = levels.min() / levels.max(), 1 - (levels.min() / levels.max()) ** 1.4
    map_share = np.round(((levels / levels.max()) ** 1.4 - low**1.4) / span * (weight * 255 * 256)).astype(int)
    image_share = np.round(levels_of(image) * ((1 - weight) * 256)).astype(int)
    assert np.array_equal(found, (image_share + map_share[..., None] + 128) >> 8)


def test_every_pair_of_levels_is_the_formula_rounded():
    levels = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 256, axis=1)
    image = Image.fromarray(np.repeat(levels.T[..., None], 3, axis=2))
    found = levels_of(IGOverlay().apply(image, Image.fromarray(levels), 1.7))
    expected = 255 * blend_map(*tensors(image, levels), 0.5, 1.7).permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= 0.51


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [0, 1, 7, 100, 254, 255])
@pytest.mark.parametrize("power", [1.0, 1.3, 1.9])
@pytest.mark.parametrize("width", [1, 7, 69, 130])
def test_constant_map_only_darkens_whatever_its_size(width, power, level, dtype):
    """One ulp between neighbours of `pow` was stretched to the whole range by min-max."""
    image = torch.rand(2, 3, 1, width, dtype=dtype)
    constant = torch.full((2, 1, 1, width), level / 255, dtype=dtype)
    assert torch.equal(blend_map(image, constant, 0.5, power), 0.5 * image)


def test_one_constant_map_of_a_batch_leaves_the_others():
    image, levels = torch.rand(2, 3, 5, 4), torch.rand(2, 1, 5, 4)
    levels[0] = 100 / 255
    found = blend_map(image, levels, 0.5, torch.tensor([1.9, 1.3]).view(2, 1, 1, 1))
    assert torch.equal(found[0], 0.5 * image[0])
    torch.testing.assert_close(found[1], blend_map(image[1], levels[1], 0.5, 1.3))


def test_formula_is_the_papers():
    image, levels = torch.rand(3, 5, 4), torch.rand(1, 5, 4)
    powered = levels**1.3
    expected = 0.5 * image + 0.5 * (powered - powered.min()) / (powered.max() - powered.min())
    torch.testing.assert_close(blend_map(image, levels, 0.5, 1.3), expected)


def test_formula_scales_each_map_of_a_batch_by_its_own_range():
    images, levels = torch.rand(3, 3, 6, 6), torch.rand(3, 1, 6, 6) * torch.tensor([1.0, 0.1, 0.5]).view(3, 1, 1, 1)
    together = blend_map(images, levels, 0.4, 1.5)
    torch.testing.assert_close(
        together, torch.stack([blend_map(*pair, 0.4, 1.5) for pair in zip(images, levels, strict=True)])
    )


@pytest.mark.parametrize("constant", [0, 1, 200, 255])
def test_constant_map_counts_as_zeros(constant):
    image, levels = noise_image(0), np.full((16, 16), constant, np.uint8)
    found = levels_of(IGOverlay().apply(image, Image.fromarray(levels), 1.5))
    assert np.abs(found - levels_of(image) / 2).max() <= 0.5
    blended = blend_map(*tensors(image, levels), 0.5, 1.5)
    torch.testing.assert_close(blended, tensors(image, levels)[0] / 2)


def test_weight_zero_is_the_image():
    image = noise_image(0)
    found = IGOverlay(overlay_weight=0).apply(image, Image.fromarray(ramp(0, 16, 16)), 1.5)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(image))
    pixels, levels = tensors(image, ramp(0, 16, 16))
    assert torch.equal(blend_map(pixels, levels, 0), pixels)


def test_weight_one_is_the_map():
    found = IGOverlay(overlay_weight=1).apply(noise_image(0), Image.fromarray(ramp(0, 16, 16)), 1.0)
    np.testing.assert_array_equal(np.asarray(found), np.repeat(ramp(0, 16, 16)[..., None], 3, axis=2))


def test_image_equal_to_its_map_does_not_change():
    image = Image.fromarray(ramp(1)).convert("RGB")
    np.testing.assert_array_equal(
        np.asarray(IGOverlay().apply(image, Image.fromarray(ramp(1)), 1.0)), np.asarray(image)
    )


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (64, 64), (20, 90)])
def test_map_of_another_size_covers_the_whole_image(size):
    image = Image.fromarray(ramp(0)).convert("RGB")
    found = IGOverlay().apply(image, Image.fromarray(ramp(0)).resize(size, Image.Resampling.BILINEAR), 1.0)
    assert found.size == image.size
    assert np.abs(levels_of(found) - levels_of(image)).max() <= 22
    assert np.corrcoef(levels_of(found)[..., 0].ravel(), levels_of(image)[..., 0].ravel())[0, 1] > 0.998


def test_one_pixel_image_with_a_larger_map():
    found = IGOverlay().apply(Image.new("RGB", (1, 1), (10, 20, 30)), Image.fromarray(ramp(0)), 1.5)
    assert found.getpixel((0, 0)) == (5, 10, 15)


def test_image_and_map_are_not_changed():
    image, levels = noise_image(0), Image.fromarray(ramp(0, 16, 16))
    before = image.tobytes(), levels.tobytes()
    IGOverlay().apply(image, levels, 1.5)
    assert (image.tobytes(), levels.tobytes()) == before


def test_power_runs_from_1_to_its_largest_and_is_uniform_in_the_logarithm():
    overlay = IGOverlay(max_power=2.0)
    assert overlay.power(0.0) == 1
    assert overlay.power(0.5) == pytest.approx(2**0.5)
    assert 1.99 < overlay.power(1 - 1e-9) <= 2
    assert IGOverlay(max_power=1.0).power(0.7) == 1


def test_very_large_power_of_a_faint_map_stays_finite():
    levels = np.zeros((4, 4), np.uint8)
    levels[0, 0] = 1
    found = IGOverlay(max_power=1000).apply(Image.new("RGB", (4, 4)), Image.fromarray(levels), 900.0)
    assert levels_of(found).max() <= 128


def test_defaults_are_the_papers():
    assert IGOverlay() == IGOverlay(overlay_prob=0.1, overlay_weight=0.5, max_power=2.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("overlay_prob", value) for value in (-0.1, 1.1, float("nan"))),
        *(("overlay_weight", value) for value in (-0.1, 1.1, float("nan"))),
        *(("max_power", value) for value in (0.9, -1, float("nan"), float("inf"))),
    ],
)
def test_setting_out_of_range_is_named(name, value):
    with pytest.raises(InputError, match=f"{name} must be"):
        IGOverlay(**{name: value})


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_formula_refuses_a_weight_out_of_range(weight):
    with pytest.raises(InputError, match="overlay_weight must be in"):
        blend_map(torch.zeros(3, 2, 2), torch.zeros(1, 2, 2), weight)


@pytest.mark.parametrize("mode", ["RGB", "F", "I;16"])
def test_map_of_another_mode_is_an_error(mode):
    with pytest.raises(InputError, match="8-bit greyscale image"):
        IGOverlay().apply(noise_image(0), Image.new(mode, (16, 16)), 1.0)


@pytest.mark.parametrize("weight", [0.3, 0.5])
@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16", "F"])
def test_image_of_another_mode_is_an_error(mode, weight):
    """One of RGBA was blended with transparency from uninitialised memory, one of L ended in numpy's ValueError."""
    told = rf"overlays need 8-bit RGB images, got mode '{mode}'; give image\.convert\('RGB'\)"
    with pytest.raises(InputError, match=told):
        IGOverlay(overlay_weight=weight).apply(Image.new(mode, (16, 16)), Image.new("L", (16, 16)), 1.0)


def test_what_is_no_image_is_named():
    with pytest.raises(InputTypeError, match=r"image must be a PIL image, got ndarray; make one with Image\.fromarray"):
        IGOverlay().apply(np.zeros((4, 4, 3), np.uint8), Image.new("L", (4, 4)), 1.0)
    with pytest.raises(InputTypeError, match="attribution must be a PIL image, got Tensor"):
        IGOverlay().apply(noise_image(0), torch.zeros(16, 16), 1.0)


@pytest.mark.parametrize("power", [0, -1.0, 0.5, float("nan"), float("inf"), "1"])
def test_power_that_is_none_is_named(power):
    """Of a power of 0 or below nothing was left of the map, and numpy warned."""
    with pytest.raises((InputError, InputTypeError), match="power must be"):
        IGOverlay().apply(noise_image(0), Image.fromarray(ramp(0, 16, 16)), power)
