"""Any classifier is a teacher of maps, wrapped or with computed weights: its maps are captum's, or one line says no."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients
from timm.task.distillation import DistillationTeacher
from tiny_parts import ImageList, noise_image, tiny_teacher
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from timm_igkd.attribution.engine import FastEngine
from timm_igkd.attribution.lighter_model import LeanReLU, lighter_model, outputs_and_gradient, use_lean_relu
from timm_igkd.attribution.options import IGOptions, TeacherView
from timm_igkd.attribution.teacher_copy import answer_to_noise, teacher_copy
from timm_igkd.errors import InputError, InputTypeError
from timm_igkd.eval_mode import bare_model, copy_model
from timm_igkd.maps.build import compute_maps
from timm_igkd.models.loading import weights_hash

CFG = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
IMAGES = ImageList([noise_image(seed, 24, 24) for seed in range(4)], [0, 1, 0, 1])
OPTIONS = IGOptions(n_steps=4)
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")


def normed(norm: Callable[[nn.Module], Any]) -> nn.Module:
    """Return a teacher whose convolutions have computed weights, and which was trained since it was used."""
    model = tiny_teacher()
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d):
            norm(module)
    model.eval()(torch.rand(1, 3, 32, 32))
    for parameter in model.parameters():  # what the forward pass left in the layers is no longer right
        parameter.data.mul_(1.1)
    return model


class Net(nn.Module):
    """Convolution, batch norm, activation, classifier, and something done between them."""

    def __init__(self, between: str = "", channels: int = 3, activation: type[nn.Module] = nn.ReLU6):
        super().__init__()
        torch.manual_seed(0)
        self.between, self.num_classes = between, 2
        self.conv, self.norm = nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.alias = self.norm  # a second name of one layer
        self.act, self.head = activation(inplace=True), nn.Linear(8, 2)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.2, 3)
        self.pretrained_cfg = CFG | {"input_size": (channels, 32, 32)}
        if between == "shared weight":
            self.again.weight = nn.Parameter(torch.randn(8, 8, 3, 3) / 8)
            self.third = nn.Conv2d(8, 8, 3, padding=1)
            self.third.weight = self.again.weight

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv(x)
        if self.between == "in place before the norm":
            conv.mul_(2)
        if self.between == "reads the weight":
            conv = conv + F.conv2d(x, self.conv.weight, padding=1)
        x = self.act(self.alias(conv))
        if self.between == "in place after the activation":
            x.mul_(2)
        if self.between == "in place on a view":
            x[:, :4].add_(1)
        if self.between == "shared weight":
            x = self.third(self.act(self.alias(self.again(x))))
        if self.between == "shortcut":
            x = x + conv
        if self.between == "shortcut of the gradient alone":
            x = x + 10 * (conv - conv.detach())
        return self.head(x.mean((2, 3)))


def torchvision_net() -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.mobilenet_v2(num_classes=2, width_mult=0.25)
    model.pretrained_cfg = CFG
    return model.eval()


def deit() -> nn.Module:
    torch.manual_seed(0)
    model: Any = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=2, img_size=32, depth=2)
    model.set_distilled_training(True)
    return model.train()


def grey(name: str = "test_resnet") -> nn.Module:
    torch.manual_seed(0)
    cfg = {"input_size": (1, 32, 32), "mean": (0.5, 0.4, 0.3)}
    return timm.create_model(name, num_classes=2, in_chans=1, pretrained_cfg_overlay=cfg).eval()


TEACHERS: dict[str, Callable[[], nn.Module]] = {
    "plain": tiny_teacher,
    "double": lambda: tiny_teacher().double(),
    "DataParallel": lambda: nn.DataParallel(tiny_teacher()),
    "compiled": lambda: torch.compile(tiny_teacher(), backend="eager"),  # type: ignore[dict-item, return-value]
    "compiled in DataParallel": lambda: nn.DataParallel(torch.compile(tiny_teacher(), backend="eager")),  # type: ignore
    "DistillationTeacher": lambda: DistillationTeacher(tiny_teacher()),
    "torchvision": torchvision_net,
    "weight norm": lambda: normed(parametrizations.weight_norm),
    "old weight norm": lambda: normed(weight_norm),
    "spectral norm": lambda: normed(parametrizations.spectral_norm),
    "old spectral norm": lambda: normed(spectral_norm),
    "orthogonal": lambda: normed(parametrizations.orthogonal),
    "pruned": lambda: normed(lambda conv: prune.random_unstructured(conv, "weight", 0.3)),  # type: ignore
    "distilled DeiT": deit,
    "grey": grey,
    **{
        between or "simple": lambda between=between: Net(between)  # type: ignore[misc]
        for between in (
            "",
            "in place before the norm",
            "in place after the activation",
            "in place on a view",
            "reads the weight",
            "shared weight",
            "shortcut",
            "shortcut of the gradient alone",
        )
    },
}


@pytest.mark.parametrize("name", TEACHERS)
def test_attributions_equal_captums_of_the_teacher_as_it_is(name):
    teacher = TEACHERS[name]()
    copied = teacher_copy(teacher)
    view = TeacherView(copied)
    inputs, targets = torch.stack([view(image) for image in IMAGES.images]), torch.tensor(IMAGES.labels)
    engine = FastEngine(copied, OPTIONS, 5, view.shape)
    found = engine.attribute(inputs, torch.zeros_like(inputs[:1]), targets, engine.forward(inputs))
    teacher, inputs = (teacher.double(), inputs.double()) if name == "double" else (teacher, inputs)
    expected = IntegratedGradients(teacher.eval()).attribute(inputs, target=targets, n_steps=4, internal_batch_size=4)
    assert float(expected.abs().max()) > 0
    differences = (found.values - expected).abs().amax((1, 2, 3)) / expected.abs().amax((1, 2, 3))
    assert differences.median() <= 1e-4
    assert differences.max() <= 5e-3  # float32's rounding flips a ReLU's gate now and then, see test_agreement.py
    torch.testing.assert_close(found.logits, teacher(inputs).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ["fast", "captum"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_maps_of_a_teacher_in_half_precision_are_those_of_its_float32_copy(dtype, engine, tmp_path):
    teacher = tiny_teacher().to(dtype)
    stores = {
        name: compute_maps(model, IMAGES, tmp_path / name, options=OPTIONS, engine=engine, progress=False)
        for name, model in {"half": teacher, "float": tiny_teacher().to(dtype).float()}.items()
    }
    assert next(teacher.parameters()).dtype == dtype
    assert stores["half"].provenance.teacher.weights_sha256 == weights_hash(teacher)
    for index in range(4):
        assert np.array_equal(stores["half"].levels(index), stores["float"].levels(index))


@pytest.mark.parametrize("engine", ["fast", "captum"])
def test_wrapper_changes_neither_maps_nor_the_teachers_hash(engine, tmp_path):
    plain, wrapped = (
        compute_maps(model, IMAGES, tmp_path / name, options=OPTIONS, engine=engine, progress=False)
        for name, model in {"plain": tiny_teacher(), "wrapped": nn.DataParallel(tiny_teacher())}.items()
    )
    assert plain.provenance.teacher == wrapped.provenance.teacher
    assert all(np.array_equal(plain.levels(index), wrapped.levels(index)) for index in range(4))


def test_grey_teacher_sees_pillows_grey_with_the_mean_of_its_means():
    view, image = TeacherView(grey()), noise_image(0, 32, 32)
    expected = (torch.from_numpy(np.array(image.convert("L"))) / 255 - 0.4) / 0.5
    torch.testing.assert_close(view(image), expected[None])
    assert view.statistics["mean"] == pytest.approx((0.4,))


def test_grey_teachers_store_says_what_it_was_fed(tmp_path):
    made_by = compute_maps(grey(), IMAGES, tmp_path, options=OPTIONS, progress=False).provenance.teacher
    assert (made_by.input_size, len(made_by.mean), len(made_by.std)) == ((1, 32, 32), 1, 1)


class Returns(nn.Module):
    """A teacher whose forward is given."""

    def __init__(self, forward: Callable[[Tensor], Any], **attributes: Any):
        super().__init__()
        self.weight, self.function, self.pretrained_cfg = nn.Parameter(torch.ones(2)), forward, CFG
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: timm.create_model("test_resnet", in_chans=4, num_classes=2), "reads 4 channels.*in_chans=3 or 1"),
    (lambda: "resnet50", "must be a model, got str; make it with timm"),
    (lambda: timm.create_model("test_resnet", features_only=True), "no input_size|must return logits.*got list"),
    (lambda: timm.create_model("test_resnet", num_classes=0), "num_classes 0, but returns"),
    (lambda: Returns(lambda x: (pooled(x), pooled(x))), "must return logits .* got tuple; wrap it"),
    (lambda: Returns(lambda x: {"logits": pooled(x)}), "must return logits .* got dict"),
    (lambda: Returns(lambda x: x), r"must return logits .* got float32 of shape \[1, 3, 32, 32\]"),
    (lambda: Returns(lambda x: pooled(x).mean(1)), r"got float32 of shape \[1\]"),
    (lambda: Returns(lambda x: pooled(x).argmax(1, keepdim=True)), r"got int64 of shape \[1, 1\]"),
    (lambda: Returns(lambda x: pooled(x.detach())), "cannot be attributed .*must be differentiable in float32"),
    (lambda: Returns(lambda x: pooled(x) - pooled(x).mean(0)), "answers an image differently beside another"),
    (lambda: Returns(pooled, pretrained_cfg={}), "has no input_size; set teacher.pretrained_cfg"),
    (lambda: Returns(pooled, pretrained_cfg={"input_size": (3, 8, 8), "mean": (0, 0, 0)}), "has no std"),
    (lambda: Returns(pooled, num_classes=5), "num_classes 5, but returns 3"),
    (lambda: Net("in place on a view", activation=nn.ReLU).eval(), "cannot be attributed .*modified by an inplace"),
    (
        lambda: Returns(lambda x: nn.Linear(7, 2)(x.flatten(1))),
        r"cannot be attributed on an image of \[3, 32, 32\] \(.*\); choose another img_size, or set a pretrained_cfg",
    ),
    (
        lambda: timm.create_model("test_vit", img_size=50),
        r"on an image of \[3, 50, 50\] \(.*divisible by patch size.*\); choose another img_size",
    ),
]


@pytest.mark.parametrize(("create", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_teacher_that_cannot_be_attributed_is_refused_before_anything_is_written(create, message, tmp_path):
    with pytest.raises((InputError, InputTypeError), match=message) as raised:
        compute_maps(create(), IMAGES, tmp_path / "maps", options=OPTIONS, progress=False)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "maps").exists()


@pytest.mark.parametrize("method", ["ig", "input_x_gradient", "saliency", "grad_cam", "none"])
def test_inference_mode_is_refused_by_its_name(method, tmp_path):
    """The teacher was said not to be differentiable."""
    images = ImageList([noise_image(seed, 64, 64) for seed in range(2)], [0, 1])
    settings: dict[str, Any] = {"options": IGOptions(method=method), "logits": True, "progress": False}
    told = r"tried with a gradient, which torch\.inference_mode\(\) has none of; use torch\.no_grad\(\)"
    with torch.inference_mode(), pytest.raises(InputError, match=told):
        compute_maps(tiny_teacher(size=64), images, tmp_path / "maps", **settings)
    assert not (tmp_path / "maps").exists()
    with torch.no_grad():
        assert len(compute_maps(tiny_teacher(size=64), images, tmp_path / "maps", **settings)) == 2


@pytest.mark.parametrize("name", ["plain", "weight norm", "old weight norm", "spectral norm", "pruned"])
def test_teacher_is_left_as_it_was(name):
    teacher = TEACHERS[name]().train()
    before = weights_hash(teacher)
    teacher_copy(teacher)
    assert weights_hash(teacher) == before
    assert teacher(torch.rand(2, 3, 32, 32)).shape == (2, 2)
    assert teacher.training
    assert all(parameter.requires_grad for parameter in teacher.parameters())


class Gated(nn.Module):
    """Reads an activation's output three times: gate, product and shortcut."""

    def __init__(self, activation: type[nn.Module]):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.activation, self.last = activation(inplace=True), activation(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.activation(4 * self.first(x))
        gated = features * features.mean((2, 3), keepdim=True).sigmoid()
        return self.last(self.second(gated) + features).mean((2, 3))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6])
def test_lean_activations_change_no_bit_of_a_gradient(activation):
    torch.manual_seed(0)
    plain = Gated(activation).eval().requires_grad_(False)
    lean = copy.deepcopy(plain)
    assert use_lean_relu(lean) == 2
    example = torch.rand(1, 3, 16, 16)
    for ours, theirs in zip(outputs_and_gradient(lean, example), outputs_and_gradient(plain, example), strict=True):
        assert torch.equal(ours, theirs)


def test_lean_relu6_is_used_where_its_output_stays_as_it_is():
    example = torch.rand(1, 3, 32, 32)
    lean = {
        between: any(isinstance(m, LeanReLU) for m in lighter_model(Net(between).eval(), example).modules())
        for between in ("", "in place after the activation")
    }
    assert lean == {"": True, "in place after the activation": False}


def test_layer_of_two_names_is_folded_under_both():
    folded = lighter_model(Net().eval(), torch.rand(1, 3, 32, 32))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


def test_attribute_called_module_is_no_wrapper():
    model = nn.Sequential()
    model.module = nn.Linear(2, 2)
    assert bare_model(model) is model


def test_cached_tensors_of_a_model_are_copied_too():
    model: Any = nn.Linear(2, 2)
    model.cache = {"a": [model.weight * 2]}
    copied: Any = copy_model(model)
    assert torch.equal(copied.cache["a"][0], model.weight * 2)
    assert copied.cache["a"][0] is not model.cache["a"][0]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_answer_for_the_manifest_depends_on_no_setting_of_the_caller(dtype):
    model, seen = tiny_teacher(), []
    expected = answer_to_noise(model)
    model.register_forward_hook(lambda module, args, output: seen.append((torch.get_num_threads(), output.dtype)))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            assert answer_to_noise(model) == expected
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [(1, torch.float32)]


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_teachers_of_fewer_attributes_than_timms_have_maps(default, tmp_path):
    traced = fx.symbolic_trace(tiny_teacher("test_resnet", classes=2, size=32))
    traced.pretrained_cfg, traced.num_classes = CFG, 2
    without_parameters = Returns(pooled)
    del without_parameters.weight
    torch.set_default_dtype(default)
    try:
        for number, teacher in enumerate((traced, without_parameters)):
            folder = tmp_path / str(number)
            assert compute_maps(teacher.eval(), IMAGES, folder, options=OPTIONS, progress=False) is not None
    finally:
        torch.set_default_dtype(torch.float32)
