"""Methods beside integrated gradients: captum's numbers where captum is right, written-out ones where it is not."""

import pytest
import timm
import torch
from captum.attr import InputXGradient, LayerGradCam, Saliency
from tiny_parts import tiny_teacher
from torch import Tensor, nn

from timm_igkd.attribution.engine import FastEngine
from timm_igkd.attribution.grad_cam import GradCAM, check_method
from timm_igkd.attribution.ig_options import IGOptions
from timm_igkd.attribution.options import reduce_channels
from timm_igkd.errors import InputError
from timm_igkd.feature_maps import as_map

TARGETS = torch.tensor([0, 1, 2, 3, 0])
GRAD_CAM = IGOptions(method="grad_cam")


def noise(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def tiny_swin() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=4, **sizes).eval().requires_grad_(False)


def values(model: nn.Module, inputs: Tensor, **options: object) -> Tensor:
    engine = FastEngine(model, IGOptions(**options), 2, tuple(inputs.shape[1:]), workers=2)
    return engine.attribute(inputs, torch.zeros_like(inputs[:1]), TARGETS, model(inputs).detach()).values


@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize(
    ("name", "layer"), [("test_resnet", "layer4"), ("test_efficientnet", "bn2"), ("test_convnext", "stages")]
)
def test_grad_cam_is_captums_on_cnns(name, layer, output):
    model, inputs = tiny_teacher(name, classes=4, size=96), noise(5, 3, 96, 96)

    def forward(x: Tensor) -> Tensor:
        return model(x).softmax(-1) if output == "probability" else model(x)

    wanted = LayerGradCam(forward, model.get_submodule(layer)).attribute(inputs, TARGETS).detach()
    found = GradCAM(model.requires_grad_(False), output, inputs[:1])(inputs, TARGETS)
    torch.testing.assert_close(found, wanted[:, 0], rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_grad_cam_of_a_class_token_is_that_of_the_last_blocks_norm1():
    model, inputs = tiny_teacher("test_vit", classes=4, size=64), noise(1, 3, 64, 64)
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(inputs)))
    for block in model.blocks[:-1]:
        tokens = block(tokens)
    block, tokens = model.blocks[-1], tokens.detach()
    keys = block.norm1(tokens).detach().requires_grad_()
    tokens = tokens + block.ls1(block.attn(keys))
    tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    model.head(model.fc_norm(model.norm(tokens)[:, 0]))[0, 2].backward()
    weights = keys.grad[0, 1:].mean(0)  # over the 4 x 4 patches; token 0 is the class's
    wanted = torch.stack([keys[0, 1 + patch] @ weights for patch in range(16)]).view(4, 4).detach()
    found = GradCAM(model.requires_grad_(False), "logit", inputs)(inputs, torch.tensor([2]))[0]
    torch.testing.assert_close(found, wanted)
    assert found.std() > 0


def test_grad_cam_of_swin_weights_the_channels_of_its_last_axis():
    model, inputs = tiny_swin(), noise(1, 3, 32, 32)
    features = model.forward_features(inputs).requires_grad_()
    model.forward_head(features)[0, 1].backward()
    wanted = torch.zeros(8, 8)
    for channel in range(16):
        wanted += features.grad[0, :, :, channel].mean() * features[0, :, :, channel].detach()
    found = GradCAM(model, "logit", inputs)(inputs, torch.tensor([1]))[0]
    torch.testing.assert_close(found, wanted)


def test_tokens_are_laid_out_row_by_row_without_the_prefix():
    class Tokens(nn.Module):
        num_prefix_tokens = 2

    tokens = torch.arange(2 + 3 * 6).view(1, -1, 1)
    assert as_map(Tokens(), tokens, (48, 96))[0, 0].tolist() == torch.arange(2, 20).view(3, 6).tolist()
    assert as_map(Tokens(), tokens[:, 2:], (48, 96))[0, 0, 1, 0] == 8  # of blocks that the prefix joins later


@pytest.mark.parametrize(("reduction", "least"), [("positive", 0.0), ("sum", None)])
def test_grad_cam_is_enlarged_after_its_relu(reduction, least):
    model, inputs = tiny_teacher("test_convnext", classes=4, size=64), noise(5, 3, 64, 64)
    found = reduce_channels(values(model, inputs, method="grad_cam", reduction=reduction), reduction)
    coarse = GradCAM(model.requires_grad_(False), "logit", inputs[:1])(inputs, TARGETS)
    assert (coarse < 0).any()
    coarse = coarse.clamp_min(0) if least == 0 else coarse
    wanted = nn.functional.interpolate(coarse[:, None], size=(64, 64), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
@pytest.mark.parametrize("method", ["input_x_gradient", "saliency"])
def test_gradients_are_captums(method, name):
    model, inputs = tiny_teacher(name, classes=4, size=32), noise(5, 3, 32, 32)
    found = values(model, inputs, method=method)
    wanted = {"input_x_gradient": InputXGradient, "saliency": Saliency}[method](model)
    wanted = wanted.attribute(inputs.clone().requires_grad_(), TARGETS).detach()
    found = found.abs() if method == "saliency" else found
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_workers_change_no_bit_of_grad_cam(name):
    model, inputs = tiny_teacher(name, classes=4, size=64), noise(5, 3, 64, 64)
    one, four = (FastEngine(model, GRAD_CAM, 1, (3, 64, 64), workers=workers) for workers in (1, 4))
    logits = one.forward(inputs)
    found = [engine.attribute(inputs, inputs[:1], TARGETS, logits).values for engine in (one, four)]
    assert torch.equal(*found)
    assert found[0].any()


def test_the_engines_outputs_are_the_models_beside_grad_cam():
    model, inputs = tiny_teacher("test_vit", classes=4, size=32), noise(2, 3, 32, 32)
    torch.testing.assert_close(FastEngine(model, GRAD_CAM, 2, (3, 32, 32)).forward(inputs), model(inputs).detach())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gradcam"}, r"method must be one of .* got 'gradcam' \(did you mean 'grad_cam'\?\)"),
        ({"method": "saliency", "n_steps": 5}, "n_steps is of the path of method 'ig', 'saliency' has none"),
        ({"method": "grad_cam", "n_steps": "auto"}, "n_steps is of the path of method 'ig', 'grad_cam' has none"),
        ({"method": "input_x_gradient", "baseline": "black"}, "baseline is of the path"),
        ({"method": "saliency", "tolerance": 0.9}, "tolerance is of the path"),
        ({"method": "grad_cam", "reduction": "abs_sum"}, "reduction of grad_cam must be 'positive'"),
    ],
)
def test_options_that_a_method_does_not_use_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        IGOptions(**options)


def test_defaults_depend_on_the_method():
    found = [(o.n_steps, o.reduction) for o in (IGOptions(), IGOptions(method="saliency"), GRAD_CAM)]
    assert found == [(50, "abs_sum"), (1, "abs_sum"), (1, "positive")]


def test_options_that_a_method_uses_are_told():
    assert list(IGOptions().used) == ["method", "n_steps", "baseline", "target", "output", "reduction"]
    assert list(IGOptions(n_steps="auto").used) == list(vars(IGOptions()))
    assert list(GRAD_CAM.used) == ["method", "target", "output", "reduction"]


class Headless(nn.Sequential):
    """A classifier without timm's two halves."""


class Branches(nn.Linear):
    def forward_features(self, x: Tensor) -> list[Tensor]:
        return [x, x]

    def forward_head(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (tiny_teacher("test_resnet", size=32), "grad_cam of ResNet at 32x32 pixels is a map of a single pixel"),
        (
            Headless(nn.Flatten(), nn.Linear(3072, 2)),
            "needs timm's forward_features and forward_head, Headless has none",
        ),
        (Branches(1, 1), "needs one last feature map, Branches has 2 branches"),
    ],
)
def test_teacher_without_a_map_is_refused_in_one_line(model, message):
    with pytest.raises(InputError, match=message) as caught:
        check_method(model, GRAD_CAM, (3, 32, 32))
    assert "\n" not in str(caught.value)
    assert "take another method than grad_cam" in str(caught.value)
    check_method(model, IGOptions(), (3, 32, 32))


def test_a_teacher_whose_forward_is_more_than_its_head_is_refused():
    """Its maps were of another function than its logits, its targets and its answers."""
    model = tiny_teacher("test_resnet", size=64)
    check_method(model, GRAD_CAM, (3, 64, 64))
    own = model.forward
    model.forward = lambda x: own(x).flip(1)  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"of ResNet must lead to the logits of its forward, got others; take another"):
        check_method(model, GRAD_CAM, (3, 64, 64))
    check_method(model, IGOptions(), (3, 64, 64))


def test_a_network_that_keeps_its_class_token_alone_is_not_asked_for_larger_images():
    model = timm.create_model("pit_ti_224", num_classes=2).eval()
    with pytest.raises(InputError, match="a map of a single pixel, expected at least 2; take another method than"):
        check_method(model, GRAD_CAM, (3, 224, 224))
