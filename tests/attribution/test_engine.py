"""The fast engine where a shortcut of its own could mix things up: baselines, and gradients that images share."""

import pytest
import torch
from test_attribution import attribute, images_in
from tiny_parts import tiny_teacher

from timm_igkd.attribution.engine import FastEngine
from timm_igkd.attribution.ig_options import IGOptions
from timm_igkd.attribution.options import TeacherView


@pytest.mark.parametrize("kind", ["black", "blur", "noise"])
def test_engines_agree_from_every_baseline(kind):
    model = tiny_teacher("test_vit", classes=4)
    inputs, targets = images_in(model, 3), torch.tensor([3, 0, 1])
    baselines = TeacherView(model).baseline(inputs, kind, [0, 1, 2])
    fast, captum = (attribute(name, model, inputs, baselines, targets, n_steps=8) for name in ("fast", "captum"))
    torch.testing.assert_close(fast.values, captum.values.to(fast.values), rtol=1e-3, atol=1e-5)


def test_images_of_other_classes_begin_with_gradients_of_their_own():
    """With steps placed automatically and one baseline for all, the first gradient is computed once a class."""
    model = tiny_teacher(classes=4)
    inputs, targets = images_in(model, 3), torch.tensor([3, 0, 1])
    baselines = TeacherView(model).baseline(inputs, "mean", [])
    together = attribute("fast", model, inputs, baselines, targets, n_steps="auto")
    for index in range(3):
        at = slice(index, index + 1)
        alone = attribute("fast", model, inputs[at], baselines, targets[at], n_steps="auto")
        torch.testing.assert_close(together.values[at], alone.values, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["black", "blur", "noise"])
def test_batches_of_one_image_begin_with_gradients_of_their_own(kind):
    """Of noise and blur each image has its own baseline, and no gradient there is another's of its class."""
    model = tiny_teacher(classes=4)
    inputs, targets = images_in(model, 2), torch.tensor([3, 3])
    engine = FastEngine(model, IGOptions(n_steps="auto", baseline=kind), 16, tuple(inputs.shape[1:]))
    for index in range(2):
        at = slice(index, index + 1)
        baseline = TeacherView(model).baseline(inputs[at], kind, [index])
        found = engine.attribute(inputs[at], baseline, targets[at], model(inputs[at]).detach())
        alone = attribute("fast", model, inputs[at], baseline, targets[at], n_steps="auto", baseline=kind)
        assert torch.equal(found.values, alone.values)


@pytest.mark.parametrize("method", ["ig", "saliency", "grad_cam"])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_callers_autocast_and_grad_mode_change_no_map(method, workers):
    model = tiny_teacher(classes=4, size=64)
    inputs, targets = images_in(model, 3), torch.tensor([3, 0, 1])
    baselines = TeacherView(model).baseline(inputs, "mean", [])

    def attributed():
        steps = {"n_steps": 8} if method == "ig" else {"n_steps": 1}
        options = IGOptions(method=method, **steps, **({"reduction": "positive"} if method == "grad_cam" else {}))
        engine = FastEngine(model, options, 4, tuple(inputs.shape[1:]), workers=workers)
        logits = engine.forward(inputs)
        return engine.attribute(inputs, baselines, targets, logits).values, logits

    expected = attributed()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attributed()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with torch.no_grad():
        found = attributed()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_callers_autocast_changes_no_map_of_the_reference():
    model = tiny_teacher(classes=4)
    inputs, targets = images_in(model, 2), torch.tensor([3, 0])
    baselines = TeacherView(model).baseline(inputs, "mean", [])
    expected = attribute("captum", model, inputs, baselines, targets, n_steps=4).values
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attribute("captum", model, inputs, baselines, targets, n_steps=4).values, expected)


def test_a_teacher_with_weights_of_five_dimensions_has_maps():
    """A lambda layer's convolution is one over three axes, which knows no channels last of four."""
    model = tiny_teacher("lambda_resnet26t", classes=4, size=64)
    inputs, targets = images_in(model, 2), torch.tensor([3, 0])
    baselines = TeacherView(model).baseline(inputs, "mean", [])
    fast, captum = (attribute(name, model, inputs, baselines, targets, n_steps=2) for name in ("fast", "captum"))
    torch.testing.assert_close(fast.values, captum.values.to(fast.values), rtol=1e-3, atol=1e-5)
