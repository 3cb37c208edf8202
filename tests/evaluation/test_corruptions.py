import io
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from timm_igkd.errors import InputError, InputTypeError
from timm_igkd.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt

RANDOM = ("gaussian_noise", "fog", "translate")
EACH_KIND = pytest.mark.parametrize("kind", CORRUPTIONS)
EACH_RANDOM_KIND = pytest.mark.parametrize("kind", RANDOM)


def pictures(count=8, height=32, width=32):
    """Return smooth pictures (count, 3, H, W) uint8 of mid contrast, each with a brighter rectangle somewhere."""
    draws = np.random.default_rng(0)
    coarse = torch.from_numpy(draws.uniform(0.2, 0.7, (count, 3, 5, 5)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    for picture, (top, left) in zip(smooth, draws.uniform(0, 0.7, (count, 2)), strict=True):
        y, x = int(top * height), int(left * width)
        picture[:, y : y + height // 4, x : x + width // 4] += 0.2
    return (255 * smooth).round().clamp(0, 255).to(torch.uint8)


def distance(images, corrupted):
    return (images.float() - corrupted.float()).abs().mean().item()


def test_kinds_are_the_studys():
    assert list(CORRUPTIONS) == [
        "jpeg", "gaussian_noise", "gaussian_blur", "pixelate", "contrast", "brightness", "fog", "translate",
    ]  # fmt: skip
    assert SEVERITIES == (1, 2, 3, 4, 5)


@EACH_KIND
@pytest.mark.parametrize("size", [(32, 32), (224, 224), (48, 31), (300, 260), (2, 9), (1, 1)])
def test_any_size_keeps_its_shape_and_type(kind, size):
    images = pictures(2, *size)
    for severity in (1, 5):
        corrupted = corrupt(images, kind, severity)
        assert corrupted.shape == images.shape
        assert corrupted.dtype == torch.uint8


@EACH_KIND
def test_images_are_left_as_they_are(kind):
    images = pictures()
    before = images.clone()
    corrupt(images, kind, 5)
    assert torch.equal(images, before)


@EACH_KIND
def test_same_seed_repeats(kind):
    assert torch.equal(corrupt(pictures(), kind, 3, 7), corrupt(pictures(), kind, 3, 7))


@EACH_RANDOM_KIND
def test_seeds_severities_and_images_differ(kind):
    images = pictures(1).repeat(8, 1, 1, 1)
    corrupted = corrupt(images, kind, 3)
    assert not torch.equal(corrupted, corrupt(images, kind, 3, seed=1))
    assert len(torch.unique(corrupted.flatten(1), dim=0)) > 1


@EACH_KIND
@pytest.mark.parametrize("side", [32, 64])
def test_split_of_the_batch_changes_nothing(kind, side):
    images = pictures(9, side, side)
    whole = corrupt(images, kind, 4, 3, start=5)
    parts = [corrupt(images[i:j], kind, 4, 3, start=5 + i) for i, j in ((0, 1), (1, 5), (5, 9))]
    assert torch.equal(whole, torch.cat(parts))


@EACH_KIND
def test_memory_layout_changes_nothing(kind):
    images = pictures()
    strided = images.to(memory_format=torch.channels_last)
    assert torch.equal(corrupt(images, kind, 4), corrupt(strided, kind, 4))


@EACH_KIND
@pytest.mark.parametrize("side", [32, 224])
def test_every_severity_is_further_from_the_clean_image(kind, side):
    images = pictures(64 if side == 32 or kind == "fog" else 8, side, side)  # a field of fog can be dark by chance
    distances = [0.0, *(distance(images, corrupt(images, kind, severity)) for severity in SEVERITIES)]
    assert all(weaker < stronger for weaker, stronger in itertools.pairwise(distances)), distances


@pytest.mark.parametrize(("side", "qualities"), [(32, (80, 65, 58, 50, 40)), (224, (25, 18, 15, 10, 7))])
def test_jpeg_is_pils_at_the_published_qualities(side, qualities):
    image = pictures(1, side, side)
    for severity, quality in zip(SEVERITIES, qualities, strict=True):
        buffer = io.BytesIO()
        F.to_pil_image(image[0]).save(buffer, "JPEG", quality=quality)
        assert torch.equal(corrupt(image, "jpeg", severity)[0], F.pil_to_tensor(Image.open(buffer)))


@pytest.mark.parametrize(("side", "sd"), [(32, 0.10), (224, 0.38)])
def test_noise_has_the_published_spread(side, sd):
    grey = torch.full((2, 3, side, side), 128, dtype=torch.uint8)
    noise = (corrupt(grey, "gaussian_noise", 5).double() - 128) / 255
    clamped = (sd * torch.randn(10**6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).clamp(
        -0.5, 0.5
    )
    assert noise.std().item() == pytest.approx(clamped.std().item(), rel=0.03)
    assert noise.mean().item() == pytest.approx(0, abs=0.005)


def test_strengths_between_the_published_sizes_lie_between():
    spreads = []
    for side in (32, 85, 224):
        grey = torch.full((1, 3, side, side), 128, dtype=torch.uint8)
        spreads.append(corrupt(grey, "gaussian_noise", 1).float().std().item() / 255)
    assert spreads == pytest.approx([0.04, (0.04 * 0.08) ** 0.5, 0.08], rel=0.05)


def test_blur_keeps_its_share_of_large_images():
    edge = torch.zeros((1, 3, 448, 448), dtype=torch.uint8)
    edge[..., 224:] = 255
    profile = corrupt(edge, "gaussian_blur", 5)[0, 0, 224].double().diff() / 255
    position = torch.arange(447, dtype=torch.float64)
    mean = (profile * position).sum()
    sigma = (profile * (position - mean).square()).sum().sqrt().item()
    assert sigma == pytest.approx(2 * 6, rel=0.02)


def test_pixelate_gives_blocks_of_one_colour():
    image = pictures(1, 224, 224)
    corrupted = corrupt(image, "pixelate", 5)
    blocks = corrupted.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)
    assert (blocks == blocks[..., :1]).all()
    assert distance(corrupted, image) > 0


def test_pixelate_averages_what_a_block_covers():
    stripes = torch.zeros((1, 3, 224, 224), dtype=torch.uint8)
    stripes[..., ::2] = 255
    assert distance(corrupt(stripes, "pixelate", 5), torch.tensor(127.5)) < 5


@pytest.mark.parametrize(
    ("side", "severity", "pixels_left"),
    [(32, 1, 30), (32, 2, 28), (32, 4, 24), (32, 5, 20), (224, 1, 134), (224, 5, 56)],
)
def test_pixelate_is_the_originals_box_down_and_up(side, severity, pixels_left):
    """CIFAR-10-C and ImageNet-C: `x.resize((int(side * c), …), BOX)`, then back the same way."""
    image = pictures(1, side, side)
    original = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    coarse = original.resize((pixels_left, pixels_left), Image.Resampling.BOX)
    expected = np.asarray(coarse.resize((side, side), Image.Resampling.BOX))
    assert np.array_equal(corrupt(image, "pixelate", severity)[0].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(("side", "severity", "amount"), [(32, 1, 0.75), (32, 5, 0.15), (224, 1, 0.4), (224, 5, 0.05)])
def test_contrast_is_the_originals_about_each_channels_mean(side, severity, amount):
    """CIFAR-10-C and ImageNet-C: `clip((x - means) * c + means, 0, 1)`, means over height and width of each channel."""
    image = pictures(1, side, side)
    image[:, 0] //= 2  # a red that is darker: one grey pivot for all channels would move it
    unit = image.numpy() / 255
    means = unit.mean(axis=(2, 3), keepdims=True)
    expected = 255 * np.clip((unit - means) * amount + means, 0, 1)
    found = corrupt(image, "contrast", severity).numpy()
    assert np.abs(found - expected).max() <= 0.5 + 1e-3
    np.testing.assert_allclose(found.mean(axis=(2, 3)), 255 * means[..., 0, 0], atol=0.5)


def test_brightness_brightens_in_proportion():
    image = pictures(1)
    expected = (image.float() * 1.6).clamp(0, 255)
    assert distance(expected, corrupt(image, "brightness", 5)) <= 1


def test_fog_is_smooth_and_takes_contrast():
    image = torch.zeros((4, 3, 64, 64), dtype=torch.uint8)
    image[..., ::2] = 255  # stripes: all local contrast is the image's own
    fogged = corrupt(image, "fog", 5).float()
    assert torch.equal(fogged[:, 0], fogged[:, 2])  # fog is grey
    stripes = fogged.diff(dim=3).abs().mean().item()
    along = fogged.diff(dim=2).abs().mean().item()
    assert stripes < 0.6 * 255
    assert 0 < along < 0.1 * 255
    assert fogged.mean(dim=(1, 2, 3)).min() > 64


@pytest.mark.parametrize("size", [(32, 32), (64, 32)])
@pytest.mark.parametrize(("severity", "share"), [(1, 2 / 32), (5, 8 / 32)])
def test_translate_is_a_pure_shift_with_black_behind(size, severity, share):
    images = pictures(16, *size).clamp_min(1)
    down, right = (round(share * side) for side in size)
    directions = set()
    for image, moved in zip(images, corrupt(images, "translate", severity), strict=True):
        rows, columns = (
            (moved.amax(dim=(0, 2)) > 0).nonzero().flatten(),
            (moved.amax(dim=(0, 1)) > 0).nonzero().flatten(),
        )
        dy, dx = (down if rows[0] > 0 else -down), (right if columns[0] > 0 else -right)
        expected = image.roll((dy, dx), (1, 2))
        expected[:, slice(None, dy) if dy > 0 else slice(dy, None)] = 0
        expected[:, :, slice(None, dx) if dx > 0 else slice(dx, None)] = 0
        assert torch.equal(moved, expected)
        directions.add((dy > 0, dx > 0))
    assert len(directions) == 4


def test_empty_batch_stays_empty():
    for kind in CORRUPTIONS:
        assert corrupt(pictures()[:0], kind, 1).shape == (0, 3, 32, 32)


def test_unknown_kind_is_an_error_that_offers_the_nearest():
    with pytest.raises(
        InputError, match=r"must be one of jpeg, .*got 'gausian_blur' \(did you mean 'gaussian_blur'\?\)"
    ):
        corrupt(pictures(), "gausian_blur", 1)


@pytest.mark.parametrize("severity", [0, 6, 2.5, 2.0, -1, "1"])
def test_severity_out_of_range_is_refused(severity):
    with pytest.raises(InputError, match=rf"severity must be one of 1, 2, 3, 4, 5, got {severity!r}"):
        corrupt(pictures(), "jpeg", severity)


@pytest.mark.parametrize(
    ("images", "found"), [(pictures().float(), "torch.float32"), (pictures().numpy(), "ndarray"), (None, "NoneType")]
)
def test_anything_but_a_uint8_tensor_is_refused(images, found):
    with pytest.raises(InputTypeError, match=f"must be a uint8 tensor with values 0 to 255, got {found}"):
        corrupt(images, "jpeg", 1)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 32, 32, 3), (2, 3, 0, 4)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(InputError, match=r"must have the shape \(N, 3, H, W\)"):
        corrupt(torch.zeros(shape, dtype=torch.uint8), "jpeg", 1)


def test_blur_of_large_images_is_that_of_the_whole_kernel_but_for_a_rounding():
    images = pictures(1, 260, 300)  # a radius of 28
    sigma = 6.0 * 260 / 224
    radius = math.ceil(4 * sigma)
    whole = F.gaussian_blur(images, [2 * radius + 1] * 2, [sigma] * 2)
    found = corrupt(images, "gaussian_blur", 5)
    assert (found.int() - whole.int()).abs().max() <= 1
    assert found.dtype == torch.uint8
