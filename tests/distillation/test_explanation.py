"""The explanation loss and the student's maps: their laws, and their gradients by numbers."""

import pytest
import torch
import torch.nn.functional as F
from captum.attr import InputXGradient, LayerGradCam
from tiny_parts import tiny_teacher
from torch import Tensor, nn

from timm_igkd.distillation.explanation import explanation_loss, twice_differentiable
from timm_igkd.distillation.trained_student import TrainedStudent
from timm_igkd.errors import InputError

TARGETS = torch.tensor([0, 1, 2])


def noise(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def maps(*shape: int, seed: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return noise(*shape, seed=seed, dtype=dtype).abs()


def explained(name: str, kind: str, size: int = 64, channels: str = "abs_sum") -> TrainedStudent:
    return TrainedStudent(tiny_teacher(name, classes=4, size=size), explanation=kind, channels=channels)


# ---- the loss


def test_it_is_one_minus_the_cosine_of_the_maps():
    student, teacher = maps(3, 1, 8, 8), maps(3, 1, 8, 8, seed=3)
    wanted = 1 - F.cosine_similarity(student.flatten(1), teacher.flatten(1)).mean()
    torch.testing.assert_close(explanation_loss(student, teacher), wanted)


def test_it_is_0_for_equal_maps_of_any_scale():
    student = maps(3, 1, 8, 8)
    assert explanation_loss(0.01 * student, 40 * student).item() == pytest.approx(0, abs=1e-6)


def test_the_teachers_map_is_averaged_down_to_the_students_size():
    teacher = maps(2, 1, 8, 8)
    assert explanation_loss(F.avg_pool2d(teacher, 4), teacher).item() == pytest.approx(0, abs=1e-6)


def test_images_without_a_map_or_a_label_do_not_count():
    student, teacher = maps(4, 1, 4, 4), maps(4, 1, 4, 4, seed=3)
    teacher[1] = 0
    found = explanation_loss(student, teacher, torch.tensor([3, 0, -1, 2]))
    torch.testing.assert_close(found, explanation_loss(student[[0, 3]], teacher[[0, 3]]))
    assert explanation_loss(student, torch.zeros_like(teacher)) == 0


def test_maps_of_zeros_cost_1_and_have_a_finite_gradient():
    student = torch.zeros(2, 1, 4, 4, requires_grad=True)
    loss = explanation_loss(student.relu(), maps(2, 1, 4, 4))
    loss.backward()
    assert loss.item() == 1
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_half_precision_is_computed_in_float32():
    student, teacher = maps(2, 1, 4, 4), maps(2, 1, 4, 4, seed=3)
    found = explanation_loss((1e-4 * student).half(), teacher.half())  # whose squares would underflow
    torch.testing.assert_close(found, explanation_loss(student, teacher), rtol=1e-2, atol=0)
    assert found.dtype == torch.float32


# ---- the student's maps


@pytest.mark.parametrize("channels", ["abs_sum", "positive"])
def test_input_x_gradient_is_captums(channels):
    student, input = explained("test_convnext", "input_x_gradient", 32, channels).eval(), noise(3, 3, 32, 32)
    values = InputXGradient(student.student).attribute(input.clone().requires_grad_(), TARGETS)
    wanted = values.abs().sum(1) if channels == "abs_sum" else values.sum(1).clamp_min(0)
    torch.testing.assert_close(student(input, TARGETS)[2][:, 0], wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "layer"), [("test_resnet", "layer4"), ("test_efficientnet", "bn2")])
def test_grad_cam_is_captums(name, layer):
    student, input = explained(name, "grad_cam").eval(), noise(3, 3, 64, 64)
    wanted = (
        LayerGradCam(student.student, student.student.get_submodule(layer)).attribute(input, TARGETS).relu().detach()
    )
    torch.testing.assert_close(student(input, TARGETS)[2], wanted, rtol=1e-4, atol=1e-4 * float(wanted.max()))


@pytest.mark.parametrize("kind", ["input_x_gradient", "grad_cam"])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "mobilenetv3_small_050"])
def test_logits_and_features_are_those_of_the_student_alone(name, kind):
    model, input = tiny_teacher(name, classes=4, size=64), noise(3, 3, 64, 64)
    final, (entry,) = model.forward_intermediates(input, indices=[1], output_fmt="NCHW")
    logits, features, found = TrainedStudent(model, 1, kind).eval()(input, TARGETS)
    torch.testing.assert_close(logits, model.forward_head(final))
    torch.testing.assert_close(features, entry)
    assert found.std() > 0


def test_a_head_of_zeros_does_not_hide_that_a_student_reads_its_class_token():
    model = tiny_teacher("test_vit", classes=4, size=64)
    nn.init.zeros_(model.head.weight)
    student = TrainedStudent(model, explanation="grad_cam")
    nn.init.normal_(model.head.weight)
    assert student(noise(3, 3, 64, 64), TARGETS)[2].std() > 0


# ---- gradients


def directional(student: TrainedStudent, input: Tensor, teacher: Tensor, step: float = 1e-8) -> tuple[Tensor, Tensor]:
    """Return the slope of the loss along a random direction of all weights: by autograd, and by differences."""
    weights = list(student.parameters())
    with torch.no_grad():  # a last batch norm of zeros puts whole maps on the kink of a ReLU
        for index, weight in enumerate(weights):
            weight += 0.1 * noise(*weight.shape, seed=100 + index, dtype=weight.dtype)
    directions = [noise(*weight.shape, seed=i, dtype=weight.dtype) for i, weight in enumerate(weights)]

    def loss() -> Tensor:
        return explanation_loss(student(input, TARGETS)[2], teacher)

    gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None)

    def moved(by: float) -> Tensor:
        with torch.no_grad():
            for weight, direction in zip(weights, directions, strict=True):
                weight += by * direction
        return loss().detach()

    return slope, (moved(step) - moved(-2 * step)) / (2 * step)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", ["input_x_gradient", "grad_cam"])
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "mobilenetv3_small_050", "test_vit"])
def test_the_gradient_is_that_of_differences(name, kind, memory):
    student = explained(name, kind).double().to(memory_format=memory)
    input = noise(3, 3, 64, 64, dtype=torch.float64).to(memory_format=memory)
    slope, wanted = directional(student, input, maps(3, 1, 64, 64, dtype=torch.float64))
    assert slope.item() == pytest.approx(wanted.item(), rel=1e-3)
    assert abs(slope) > 1e-6


@pytest.mark.parametrize("kind", ["input_x_gradient", "grad_cam"])
def test_the_gradient_goes_through_the_statistics_of_the_batch(kind):
    student = explained("test_resnet", kind).double().train()
    input = noise(3, 3, 64, 64, dtype=torch.float64)
    slope, wanted = directional(student, input, maps(3, 1, 64, 64, dtype=torch.float64))
    assert slope.item() == pytest.approx(wanted.item(), rel=1e-3)


def test_the_other_form_of_hard_sigmoid_is_equal_and_local():
    values = torch.linspace(-5, 5, 101, dtype=torch.float64, requires_grad=True)
    with twice_differentiable():
        found = F.hardsigmoid(values)
        in_place = nn.Hardsigmoid(inplace=True)(values * 1)
    torch.testing.assert_close(found, F.hardsigmoid(values))
    torch.testing.assert_close(in_place, found)
    (gradient,) = torch.autograd.grad(F.hardsigmoid(values).sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="hardsigmoid_backward is not implemented"):
        torch.autograd.grad(gradient.sum(), values)


def test_attention_has_its_fast_kernel_back_afterwards():
    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    with twice_differentiable():
        assert not torch.backends.cuda.flash_sdp_enabled()
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()) == before


# ---- what is refused


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


class _Plain(nn.Module):
    """A linear student after an activation."""

    def __init__(self, act):
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, 4, 4)}
        self.act, self.head = act, nn.Linear(48, 4)

    def forward(self, x):
        return self.head(self.act(x).flatten(1))


def test_a_student_without_second_derivatives_is_refused():
    TrainedStudent(_Plain(torch.sin), explanation="input_x_gradient")
    with pytest.raises(
        InputError, match=r"which student _Plain lacks .*once_differentiable.*explanation_loss_weight=0"
    ):
        TrainedStudent(_Plain(_Once.apply), explanation="input_x_gradient")


def test_a_student_whose_map_does_not_depend_on_its_weights_is_refused():
    class Detached(_Plain):
        def forward(self, x):
            return self.head(x.detach().flatten(1)).detach() + x.flatten(1)[:, :4]

    with pytest.raises(InputError, match="no gradient in student Detached"):
        TrainedStudent(Detached(torch.sin), explanation="input_x_gradient")


def test_grad_cam_of_a_single_pixel_is_refused():
    with pytest.raises(InputError, match=r"map of a single pixel.*such as input_x_gradient"):
        explained("test_resnet", "grad_cam", 32)


def test_an_unknown_map_is_refused():
    with pytest.raises(InputError, match="explanation_map"):
        TrainedStudent(_Plain(torch.sin), explanation="saliency")
