"""Convolutions with frozen weights: the outputs and input gradients of torch's own."""

import pytest
import torch
from timm.layers import Conv2dSame
from tiny_parts import tiny_teacher
from torch import Tensor, nn

from timm_igkd.attribution.activations import use_lean_relu6
from timm_igkd.attribution.folding import fold_batch_norm
from timm_igkd.attribution.frozen_conv import FrozenConv2d, freeze_convolutions

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


def input_gradient(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    points = inputs.clone().contiguous(memory_format=torch.channels_last).requires_grad_()
    output = model(points)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return output.detach().clone(), torch.autograd.grad((output * upstream).sum(), points)[0]


LAYERS = {
    "pointwise": {"kernel_size": 1},
    "pointwise in groups": {"kernel_size": 1, "groups": 2},
    "pointwise with padding": {"kernel_size": 1, "padding": 1},
    "strided pointwise": {"kernel_size": 1, "stride": 2},
    "3x3": {"kernel_size": 3, "padding": 1},
    "3x3 in groups": {"kernel_size": 3, "padding": 1, "groups": 4},
    "3x3 without bias": {"kernel_size": 3, "bias": False},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "patches": {"kernel_size": 4, "stride": 4},
    "rectangular": {"kernel_size": (1, 5), "stride": (1, 2), "padding": (0, 2)},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 8},
    "dilated depthwise": {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 8},
    "strided depthwise": {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 8},
    "strided depthwise 5x5": {"kernel_size": 5, "stride": 2, "padding": 2, "groups": 8},
    "depthwise by 3": {"kernel_size": 7, "stride": 3, "padding": 3, "groups": 8},
    "strided depthwise without padding": {"kernel_size": 3, "stride": 2, "groups": 8},
    "rectangular depthwise": {"kernel_size": (3, 5), "stride": (2, 3), "padding": (1, 2), "groups": 8},
    "two outputs per channel": {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 8, "out_channels": 16},
    "same": {"kernel_size": 3, "stride": 2, "same": True},
    "same depthwise": {"kernel_size": 3, "stride": 2, "groups": 8, "same": True},
    "same depthwise 5x5": {"kernel_size": 5, "stride": 2, "groups": 8, "same": True},
    "same dilated depthwise": {"kernel_size": 3, "stride": 2, "dilation": 2, "groups": 8, "same": True},
    "same depthwise by 1": {"kernel_size": 3, "groups": 8, "same": True},
}


@pytest.mark.parametrize("size", [(12, 12), (13, 16)])
@pytest.mark.parametrize("activation", [None, nn.ReLU, nn.ReLU6])
@pytest.mark.parametrize("name", LAYERS)
def test_frozen_convolution_is_torchs(name, activation, size):
    options = dict(LAYERS[name])
    kind = Conv2dSame if options.pop("same", False) else nn.Conv2d
    torch.manual_seed(0)
    conv = kind(8, options.pop("out_channels", 8), **options).requires_grad_(False)
    model = nn.Sequential(nn.Identity(), conv, activation() if activation else nn.Identity())
    inputs = 4 * torch.randn(3, 8, *size)
    frozen = freeze_convolutions(model, inputs[:1])
    assert isinstance(frozen[1], FrozenConv2d)
    assert isinstance(frozen[2], nn.Identity)
    expected, found = input_gradient(model, inputs), input_gradient(frozen, inputs)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["test_efficientnet", "test_resnet", "test_vit", "test_convnext", "mobilenetv2_050", "tf_efficientnet_b0"]
)
def test_frozen_model_has_the_gradients_of_the_model(name):
    teacher = tiny_teacher(name, classes=4, size=48)
    folded, _ = fold_batch_norm(teacher, torch.rand(1, 3, 48, 48))
    folded = use_lean_relu6(folded).requires_grad_(False)
    frozen = freeze_convolutions(folded, torch.rand(1, 3, 48, 48))
    assert any(isinstance(module, FrozenConv2d) for module in frozen.modules())
    inputs = torch.rand(4, 3, 48, 48, generator=torch.Generator().manual_seed(2))
    expected, found = input_gradient(folded, inputs), input_gradient(frozen, inputs)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4 * float(expected[0].abs().max()))
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-3 * float(expected[1].abs().max()))


def test_gradients_can_be_taken_again():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU6()).requires_grad_(False)
    frozen, inputs = freeze_convolutions(model, torch.rand(1, 3, 8, 8)), torch.randn(2, 3, 8, 8)
    first, second = input_gradient(frozen, inputs), input_gradient(frozen, inputs)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


class Twice(nn.Module):
    """An activation that is not the only reader of a convolution's output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return (x + self.act(x)).mean((2, 3))


class Shared(nn.Module):
    """One activation after two convolutions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.act = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.second(self.act(self.first(x)))).mean((2, 3))


@pytest.mark.parametrize("kind", [Twice, Shared])
def test_activation_that_cannot_be_fused_keeps_the_outputs(kind):
    model, inputs = kind().requires_grad_(False), torch.randn(2, 3, 8, 8)
    frozen = freeze_convolutions(model, inputs[:1])
    expected, found = input_gradient(model, inputs), input_gradient(frozen, inputs)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


def test_the_model_given_is_not_changed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).requires_grad_(False)
    freeze_convolutions(model, torch.rand(1, 3, 8, 8))
    assert [type(module) for module in model] == [nn.Conv2d, nn.ReLU]


@pytest.mark.parametrize("conv", [nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(3, 4, 3).double()])
def test_convolutions_of_another_kind_stay(conv):
    example = torch.rand(1, 3, 8, 8, dtype=conv.weight.dtype)
    assert type(freeze_convolutions(nn.Sequential(conv).requires_grad_(False), example)[0]) is nn.Conv2d
