"""Integrated gradients: laws that hold for any correct engine, and the agreement of ours with captum's."""

import copy
import threading
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.layers import ScaledStdConv2d
from tiny_parts import ImageList, noise_image, tiny_teacher
from torch import Tensor, nn

from timm_igkd.attribution.chunk_pool import ChunkPool
from timm_igkd.attribution.engine import FastEngine
from timm_igkd.attribution.lighter_model import lighter_model
from timm_igkd.attribution.options import (
    Attribution,
    CaptumEngine,
    IGOptions,
    TeacherView,
    gaussian_blur,
    reduce_channels,
    selected_output,
)
from timm_igkd.data.items import read_item
from timm_igkd.data.loading import load_labeled_images
from timm_igkd.errors import InputError, RunError
from timm_igkd.maps.build import compute_maps
from timm_igkd.maps.row_format import quantize
from timm_igkd.models.loading import load_model, weights_hash
from timm_igkd.models.output_names import class_indices

FAMILIES = ("test_efficientnet", "test_resnet", "test_vit", "test_convnext")


class Linear(nn.Module):
    """f(x) = W x + c, whose integrated gradients are known."""

    def __init__(self, classes: int = 3, size: int = 6):
        super().__init__()
        torch.manual_seed(0)
        self.num_classes = classes
        self.pretrained_cfg = {"input_size": (3, size, size), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
        self.head = nn.Linear(3 * size * size, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


def images_in(model: nn.Module, count: int, seed: int = 0) -> Tensor:
    view = TeacherView(model)
    return torch.stack([view(noise_image(seed + index, *view.size[::-1])) for index in range(count)])


def attribute(
    name: str,
    model: nn.Module,
    inputs: Tensor,
    baselines: Tensor,
    targets: Tensor,
    chunk_size: int = 16,
    **options: Any,
) -> Attribution:
    settings = IGOptions(**options)
    engine: Any
    if name == "captum":
        engine = CaptumEngine(model, settings, chunk_size)
    else:
        engine = FastEngine(model, settings, chunk_size, tuple(inputs.shape[1:]))
    with torch.no_grad():
        logits = model(inputs)
    return engine.attribute(inputs, baselines, targets, logits)


def largest_differences(found: Tensor, expected: Tensor) -> np.ndarray:
    """Return per map the largest difference, in units of the expected map's largest value."""
    found, expected = found.double(), expected.double()
    return ((found - expected).abs().amax((1, 2)) / expected.abs().amax((1, 2))).numpy()


# ---- laws


@pytest.mark.parametrize("engine", ["captum", "fast"])
@pytest.mark.parametrize("kind", ["mean", "black", "blur", "noise"])
@pytest.mark.parametrize("n_steps", [1, 7])
def test_linear_model_is_attributed_by_weight_times_difference(engine, kind, n_steps):
    model = Linear()
    inputs, targets = images_in(model, 5), torch.tensor([0, 1, 2, 0, 1])
    baselines = TeacherView(model).baseline(inputs, kind, list(range(5)))
    found = attribute(engine, model, inputs, baselines, targets, n_steps=n_steps)
    weights = model.head.weight.detach()[targets].view(5, 3, 6, 6)
    torch.testing.assert_close(found.values, weights * (inputs - baselines), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.convergence_delta, torch.zeros(5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("engine", ["captum", "fast"])
@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize("name", FAMILIES)
def test_delta_is_the_gap_to_completeness(engine, output, name):
    model = tiny_teacher(name, classes=4)
    inputs, targets = images_in(model, 4), torch.arange(4)
    baselines = TeacherView(model).baseline(inputs, "black", [])
    found = attribute(engine, model, inputs, baselines, targets, n_steps=3, output=output)
    with torch.no_grad():
        end = selected_output(model(inputs), targets, output)
        start = selected_output(model(baselines.expand_as(inputs)), targets, output)
    gap = found.values.sum((1, 2, 3)) - (end - start)
    torch.testing.assert_close(found.convergence_delta, gap, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("engine", ["captum", "fast"])
def test_more_steps_are_more_complete(engine):
    model = tiny_teacher("test_vit", classes=4)
    inputs, targets = images_in(model, 4), torch.arange(4)
    baselines = TeacherView(model).baseline(inputs, "mean", [])
    few, many = (
        attribute(engine, model, inputs, baselines, targets, n_steps=n).convergence_delta.abs().max() for n in (2, 30)
    )
    assert many < few / 10


@pytest.mark.parametrize("chunk_size", [1, 3, 64])
def test_chunks_do_not_change_the_result(chunk_size):
    model = tiny_teacher("test_convnext", classes=4)
    inputs, targets = images_in(model, 5), torch.tensor([3, 0, 0, 1, 2])
    baselines = TeacherView(model).baseline(inputs, "blur", [])
    whole = attribute("fast", model, inputs, baselines, targets, chunk_size=7, n_steps=5)
    found = attribute("fast", model, inputs, baselines, targets, chunk_size=chunk_size, n_steps=5)
    torch.testing.assert_close(found.values, whole.values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n_steps", [6, "auto"])
@pytest.mark.parametrize("name", ["test_efficientnet", "mobilenetv2_050", "test_vit"])
def test_workers_change_no_bit(name, n_steps):
    model = tiny_teacher(name, classes=4, size=48)
    inputs, targets = images_in(model, 5), torch.tensor([3, 0, 0, 1, 2])
    baselines = TeacherView(model).baseline(inputs, "mean", [])
    found = []
    for workers in (1, 2, 3):
        engine = FastEngine(model, IGOptions(n_steps=n_steps), 4, (3, 48, 48), workers=workers)
        found.append(engine.attribute(inputs, baselines, targets, engine.forward(inputs)))
    for other in found[1:]:
        assert torch.equal(other.values, found[0].values)
        assert torch.equal(other.logits, found[0].logits)
        assert torch.equal(other.n_steps, found[0].n_steps)


def test_chunks_in_flight_are_bounded_whatever_their_number():
    started, lock = [0], threading.Lock()

    def compute(part: slice) -> Tensor:
        with lock:
            started[0] += 1
        return torch.tensor(part.start)

    pool, taken = ChunkPool(2), 0
    for part, result in pool.map(compute, (slice(start, start + 1) for start in range(100))):
        assert int(result) == part.start == taken
        taken += 1
        assert started[0] <= taken + 2 * pool.workers
    assert taken == 100


def test_an_image_does_not_depend_on_its_batch():
    model = tiny_teacher("test_resnet", classes=4)
    inputs, targets = images_in(model, 5), torch.tensor([3, 0, 0, 1, 2])
    baselines = TeacherView(model).baseline(inputs, "mean", [])
    together = attribute("fast", model, inputs, baselines, targets, n_steps=5)
    alone = attribute("fast", model, inputs[3:4], baselines, targets[3:4], n_steps=5)
    torch.testing.assert_close(alone.values[0], together.values[3], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", ["captum", "fast"])
def test_steps_and_logits_are_returned(engine):
    model = tiny_teacher(classes=4)
    inputs = images_in(model, 3)
    found = attribute(engine, model, inputs, torch.zeros_like(inputs[:1]), torch.zeros(3, dtype=torch.int64), n_steps=5)
    assert found.n_steps.tolist() == [5, 5, 5]
    assert found.converged.all()
    with torch.no_grad():
        torch.testing.assert_close(found.logits, model(inputs))


# ---- agreement with captum, float maps before the 8-bit store


def captum_by_groups(model: nn.Module, inputs: Tensor, targets: Tensor, n_steps: int) -> Tensor:
    """Return captum's attributions, 8 images at a time to save memory."""
    parts = []
    for images, classes in zip(inputs.split(8), targets.split(8), strict=True):
        baselines = torch.zeros_like(images[:1])
        parts.append(attribute("captum", model, images, baselines, classes, n_steps=n_steps, chunk_size=8).values)
    return torch.cat(parts)


def assert_engines_agree(model: nn.Module, inputs: Tensor, targets: Tensor, n_steps: int, exact: int = 32) -> None:
    """Check the limits on all images, and the distance to captum in float64 on the first `exact`, where it is slow.

    With ReLUs, float32 rounding flips gates: single images differ by up to 1 / n_steps of a gradient, captum's own too.
    """
    baselines = TeacherView(model).baseline(inputs, "mean", [])
    result = attribute("fast", model, inputs, baselines, targets, n_steps=n_steps, chunk_size=16)
    ours = reduce_channels(result.values, "abs_sum")
    theirs = reduce_channels(captum_by_groups(model, inputs, targets, n_steps), "abs_sum")
    differences = largest_differences(ours, theirs)
    doubles = copy.deepcopy(model).double(), inputs[:exact].double(), targets[:exact]
    reference = reduce_channels(captum_by_groups(*doubles, n_steps), "abs_sum")
    ours_to_exact = largest_differences(ours[:exact], reference)
    theirs_to_exact = largest_differences(theirs[:exact], reference)
    print(
        f"fast-captum median {np.median(differences):.1e} worst {differences.max():.1e}; to float64: "
        f"median {np.median(ours_to_exact):.1e} vs {np.median(theirs_to_exact):.1e}, "
        f"worst {ours_to_exact.max():.1e} vs {theirs_to_exact.max():.1e}"
    )
    assert len(differences) >= 32
    assert np.median(differences) <= 1e-3
    assert differences.max() <= 5e-3
    # 1e-5: where no gate flips, both are at float32's rounding and their ratio says nothing
    assert np.median(ours_to_exact) <= max(1.5 * np.median(theirs_to_exact), 1e-5)
    assert ours_to_exact.max() <= max(1.5 * theirs_to_exact.max(), 1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_engines_agree_on_32_images(name):
    model = tiny_teacher(name, classes=10, size=64 if name == "test_vit" else 48)
    assert_engines_agree(model, images_in(model, 32), torch.arange(32) % 10, n_steps=8)


@pytest.mark.slow
@pytest.mark.shared
def test_engines_agree_on_the_imagenet_mobilenet_and_real_images(shared):
    model = load_model(f"local-dir:{shared}/weights/mobilenetv2_100.coral_in1k")
    dataset = load_labeled_images(str(shared / "data" / "imagenette_small"), "validation")
    items, view = [read_item(dataset, index) for index in range(32)], TeacherView(model)
    classes = class_indices(model, dataset.class_names, 10)
    assert classes is not None
    targets = torch.tensor([classes[label] for _, label in items])
    assert_engines_agree(model, torch.stack([view(image) for image, _ in items]), targets, n_steps=25, exact=4)


@pytest.mark.slow
@pytest.mark.shared
def test_engines_agree_on_the_released_student_and_real_images(shared):
    model = load_model(
        "mobilenetv2_cifar",
        model_args={"drop_blocks": 5},
        checkpoint=shared / "weights" / "paper_students" / "kd_92.29.safetensors",
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )
    dataset = load_labeled_images(str(shared / "data" / "cifar10"), "test")
    items, view = [read_item(dataset, index) for index in range(32)], TeacherView(model)
    targets = torch.tensor([label for _, label in items])
    assert_engines_agree(model, torch.stack([view(image) for image, _ in items]), targets, n_steps=50)


# ---- folding


def batch_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "mobilenetv2_050", "regnetx_002"])
def test_folding_keeps_the_outputs_and_removes_batch_norms(name):
    model = tiny_teacher(name, classes=5)
    before = weights_hash(model)
    inputs = images_in(model, 4)
    folded = lighter_model(model, inputs[:1])
    assert batch_norms(model) > 0
    assert batch_norms(folded) == 0
    with torch.no_grad():
        expected = model(inputs)
        torch.testing.assert_close(folded(inputs), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert weights_hash(model) == before


class Refused(nn.Module):
    """A batch norm after a convolution that must not be folded into it."""

    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.conv = ScaledStdConv2d(3, 4, 3) if kind == "standardised" else nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.2, 3)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.kind == "activation between":
            return self.norm(self.act(x)).mean((2, 3))
        if self.kind == "output used twice":
            return (self.norm(x) + x).mean((2, 3))
        return self.norm(x).mean((2, 3))


@pytest.mark.parametrize("kind", ["standardised", "activation between", "output used twice"])
def test_folding_that_would_change_the_outputs_is_refused(kind):
    model, inputs = Refused(kind).eval(), torch.rand(2, 3, 8, 8)
    folded = lighter_model(model, inputs[:1])
    assert batch_norms(folded) == 1
    assert torch.equal(folded(inputs), model(inputs))


# ---- the teacher's view and the baselines


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


# ---- targets, outputs, reductions


@pytest.mark.parametrize("engine", ["captum", "fast"])
def test_probability_differs_from_logit_and_sums_to_the_change_of_the_probability(engine):
    model = tiny_teacher("test_vit", classes=3)
    inputs, targets = images_in(model, 2), torch.tensor([1, 2])
    baselines = TeacherView(model).baseline(inputs, "mean", [])
    found = attribute(engine, model, inputs, baselines, targets, n_steps=40, output="probability")
    with torch.no_grad():
        change = model(inputs).softmax(-1) - model(baselines).softmax(-1)
    torch.testing.assert_close(
        found.values.sum((1, 2, 3)), change.gather(1, targets[:, None])[:, 0], atol=1e-3, rtol=1e-2
    )


def test_reductions():
    values = torch.tensor([1.0, -3.0, 0.5]).view(1, 3, 1, 1)
    assert reduce_channels(values, "abs_sum").item() == 4.5
    assert reduce_channels(values, "sum").item() == -1.5
    assert reduce_channels(values, "positive").item() == 0
    assert reduce_channels(-values, "positive").item() == 1.5


def test_target_changes_the_map():
    model, inputs = Linear(), images_in(Linear(), 1)
    maps = [attribute("fast", model, inputs, inputs * 0, torch.tensor([target]), n_steps=2).values for target in (0, 1)]
    assert not torch.allclose(*maps)


def test_predicted_target_is_the_teachers_class_not_the_label(tmp_path):
    model = Linear()
    dataset = ImageList([noise_image(seed, 6, 6) for seed in range(4)], [0, 1, 2, 0])
    inputs = torch.stack([TeacherView(model)(image) for image in dataset.images])
    with torch.no_grad():
        predicted = model(inputs).argmax(1)
    assert predicted.tolist() != dataset.labels
    store = compute_maps(model, dataset, tmp_path, options=IGOptions(n_steps=1, target="predicted"), progress=False)
    expected = reduce_channels(model.head.weight.detach()[predicted].view(4, 3, 6, 6) * inputs, "abs_sum")
    found = torch.from_numpy(np.stack([store.float_map(row) for row in range(4)]))
    assert ((found - expected).abs().amax((1, 2)) <= expected.amax((1, 2)) / 255).all()


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "blak"}, r"baseline must be one of .*'blak' \(did you mean 'black'\?\)"),
        ({"target": "labels"}, "target must be one of"),
        ({"output": "logits"}, "output must be one of"),
        ({"reduction": "mean"}, "reduction must be one of"),
        ({"n_steps": 0}, "n_steps must be"),
        ({"n_steps": 2.5}, "n_steps must be a whole number or 'auto'"),
        ({"n_steps": "many"}, "n_steps must be a whole number or 'auto'"),
        ({"n_steps": True}, "n_steps must be"),
        ({"max_steps": 1}, "max_steps must be"),
        ({"tolerance": 1.0}, "tolerance"),
        ({"tolerance": float("nan")}, "tolerance"),
    ],
)
def test_option_out_of_range_is_named(options, message):
    with pytest.raises(InputError, match=message):
        IGOptions(**options)


def test_captum_takes_no_automatic_steps():
    with pytest.raises(InputError, match="'auto' needs engine 'fast'"):
        CaptumEngine(Linear(), IGOptions(n_steps="auto"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_map_that_is_not_finite_is_a_run_error_with_the_images_name(bad):
    values = np.ones((4, 4), np.float32)
    values[1, 2] = bad
    with pytest.raises(RunError, match="the attribution of image 3 is not finite"):
        quantize(values, False, "image 3")


@pytest.mark.parametrize("engine", ["captum", "fast"])
def test_teacher_with_nan_weights_is_a_run_error_before_a_shard_is_written(tmp_path, engine):
    model = Linear()
    model.head.weight.data[0, 0] = float("nan")
    with pytest.raises(RunError, match="not finite; check"):
        compute_maps(model, ImageList([noise_image(0)], [0]), tmp_path / "maps", engine=engine, progress=False)
    assert not list((tmp_path / "maps").rglob("*.parquet"))
    assert not (tmp_path / "maps" / "provenance.json").exists()


# ---- the teacher is left as it was


@pytest.mark.parametrize("engine", ["captum", "fast"])
@pytest.mark.parametrize("training", [True, False])
def test_teachers_weights_gradients_and_mode_do_not_change(tmp_path, engine, training):
    model = tiny_teacher().train(training)
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    before, flags = weights_hash(model), [parameter.requires_grad for parameter in model.parameters()]
    dataset = ImageList([noise_image(0, 32, 32), noise_image(1, 32, 32)], [0, 1])
    compute_maps(model, dataset, tmp_path, options=IGOptions(n_steps=2), engine=engine, progress=False)
    assert weights_hash(model) == before
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training is training


def test_a_teacher_in_training_mode_gives_the_maps_of_eval_mode(tmp_path):
    dataset = ImageList([noise_image(0, 32, 32), noise_image(1, 32, 32)], [0, 1])
    options = IGOptions(n_steps=2)
    stores = [
        compute_maps(tiny_teacher().train(mode), dataset, tmp_path / str(mode), options=options, progress=False)
        for mode in (True, False)
    ]
    assert stores[0].rows["row_hash"][:] == stores[1].rows["row_hash"][:]


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
