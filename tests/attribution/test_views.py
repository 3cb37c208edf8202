"""What the teacher sees: the resized and normalised image, and the baselines that a path starts from."""

import numpy as np
import pytest
import torch
from attribution_parts import Linear, images_in
from PIL import Image
from timm.data import resolve_data_config
from timm.data.transforms import str_to_interp_mode
from tiny_parts import noise_image, tiny_teacher
from torchvision.transforms import Resize

from timm_igkd.attribution.options import TeacherView, gaussian_blur
from timm_igkd.errors import InputError


def test_view_is_the_whole_image_resized_and_normalised():
    model = Linear(size=6)
    image = Image.new("RGB", (12, 9), (255, 51, 0))
    found = TeacherView(model)(image)
    expected = (torch.tensor([1.0, 0.2, 0.0]) - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.3, 0.4])
    torch.testing.assert_close(found, expected.view(3, 1, 1).expand(3, 6, 6))


def test_view_does_not_resample_an_image_of_the_right_size():
    model, image = Linear(size=6), noise_image(0, 6, 6)
    view = TeacherView(model)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    torch.testing.assert_close(view(image) * view.std + view.mean, pixels)


@pytest.mark.parametrize("name", [None, "", "nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"])
@pytest.mark.parametrize("size", [(9, 7), (30, 20)])
def test_an_image_is_resized_as_timm_does_it(name, size):
    model, image = Linear(size=12), noise_image(0, *size)
    model.pretrained_cfg["interpolation"] = name
    timms = str_to_interp_mode(resolve_data_config({}, pretrained_cfg=model.pretrained_cfg)["interpolation"])
    resized = Resize((12, 12), timms)(image)
    assert torch.equal(TeacherView(model)(image), TeacherView(model)(resized))


def test_an_interpolation_that_timm_does_not_know_is_refused():
    model = Linear(size=12)
    model.pretrained_cfg["interpolation"] = "bicubicc"
    with pytest.raises(InputError, match="has interpolation 'bicubicc', expected one that timm knows"):
        TeacherView(model)


def test_view_of_a_rectangular_input_is_height_by_width():
    model = Linear()
    model.pretrained_cfg["input_size"] = (3, 4, 8)
    assert TeacherView(model)(noise_image(0, 30, 20)).shape == (3, 4, 8)


def test_baselines_are_what_their_names_say():
    model = Linear(size=32)
    view, inputs = TeacherView(model), images_in(model, 2)
    pixels = {
        kind: view.baseline(inputs, kind, [5, 6]) * view.std + view.mean for kind in ("mean", "black", "blur", "noise")
    }
    torch.testing.assert_close(pixels["mean"], view.mean.expand(1, 3, 32, 32))
    torch.testing.assert_close(pixels["black"], torch.zeros(1, 3, 32, 32), atol=1e-6, rtol=0)
    assert pixels["blur"].std() < 0.3 * (inputs * view.std + view.mean).std()
    assert (pixels["noise"] + 1e-6 >= 0).all()
    assert (pixels["noise"] <= 1 + 1e-6).all()


def test_noise_baseline_depends_on_its_seed_alone():
    model = Linear()
    view, inputs = TeacherView(model), images_in(model, 2)
    first, second = view.baseline(inputs, "noise", [5, 6]), view.baseline(inputs[:1] + 1, "noise", [6])
    assert torch.equal(first[1], second[0])
    assert not torch.equal(first[0], first[1])


def test_blur_keeps_a_constant_image_and_the_mean_of_a_wide_one():
    torch.testing.assert_close(gaussian_blur(torch.full((1, 3, 8, 8), 0.7), 2.0), torch.full((1, 3, 8, 8), 0.7))
    point = torch.zeros(1, 1, 41, 41)
    point[0, 0, 20, 20] = 1
    blurred = gaussian_blur(point, 3.0)
    torch.testing.assert_close(blurred.sum(), torch.tensor(1.0))
    torch.testing.assert_close(blurred, blurred.transpose(2, 3))
    assert blurred[0, 0, 20, 23] / blurred[0, 0, 20, 20] == pytest.approx(np.exp(-0.5), rel=1e-4)


@pytest.mark.parametrize("size", [16, 32, 48])
def test_blur_baseline_has_a_sixteenth_of_the_side_as_sigma(size):
    view = TeacherView(tiny_teacher(size=size))
    point = torch.zeros(1, 3, size, size)
    point[..., size // 2, size // 2] = 1
    blurred = view.baseline(point, "blur", [])[0, 0, size // 2]
    sigma = size / 16
    offset = round(sigma)
    expected = np.exp(-0.5 * (offset / sigma) ** 2)
    assert blurred[size // 2 + offset] / blurred[size // 2] == pytest.approx(expected, rel=1e-3)
