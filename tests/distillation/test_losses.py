"""Laws of the distillation losses and of attention transfer."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_igkd.distillation.losses import (
    KD_LOSSES,
    attention_map,
    attention_transfer,
    kd_dist,
    kd_dkd,
    kd_kl,
    kd_mse,
    kd_standardized,
)
from timm_igkd.errors import InputError

BATCH, CLASSES, TEMPERATURE = 6, 5, 2.5


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, BATCH, CLASSES, generator=rng, dtype=torch.float64) * 3
    return student, teacher


@pytest.fixture
def target() -> Tensor:
    return torch.arange(BATCH) % CLASSES


@pytest.mark.parametrize("name", KD_LOSSES)
def test_equal_logits_cost_nothing(name, logits, target):
    loss = KD_LOSSES[name](logits[0], logits[0], TEMPERATURE, target)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", KD_LOSSES)
def test_different_logits_cost_something_and_pull_the_student_closer(name, logits, target):
    student = logits[0].clone().requires_grad_()
    before = KD_LOSSES[name](student, logits[1], TEMPERATURE, target)
    (gradient,) = torch.autograd.grad(before, student)
    after = KD_LOSSES[name](student - 1e-3 * gradient, logits[1], TEMPERATURE, target)
    assert 0 < after < before


@pytest.mark.parametrize("name", KD_LOSSES)
@pytest.mark.parametrize("batch", [1, BATCH])
def test_constant_logits_have_a_finite_loss_and_gradient(name, batch, target):
    student = torch.zeros(batch, CLASSES, requires_grad=True)
    loss = KD_LOSSES[name](student, torch.randn(batch, CLASSES), TEMPERATURE, target[:batch])
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", KD_LOSSES)
def test_confident_logits_have_a_finite_loss(name, target):
    sure = F.one_hot(target, CLASSES) * 1000.0
    assert KD_LOSSES[name](-sure, sure, TEMPERATURE, target).isfinite()


@pytest.mark.parametrize("name", KD_LOSSES)
def test_half_precision_logits_under_autocast_give_the_float32_loss(name, logits, target):
    student, teacher = logits[0].bfloat16(), logits[1].bfloat16()
    expected = KD_LOSSES[name](student.float(), teacher.float(), TEMPERATURE, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = KD_LOSSES[name](student, teacher, TEMPERATURE, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", KD_LOSSES)
def test_shapes_that_would_broadcast_are_refused(name, logits, target):
    with pytest.raises(InputError, match=r"one shape .*\(6, 5\) and \(6, 1\); select .* teacher_class_indices"):
        KD_LOSSES[name](logits[0], logits[1][:, :1], TEMPERATURE, target)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperature_out_of_range_is_refused(temperature, logits):
    with pytest.raises(InputError, match="temperature must be positive and finite"):
        kd_kl(*logits, temperature)


def test_kl_is_torchs_own_with_temperature_squared(logits):
    student, teacher = logits
    own = torch.nn.KLDivLoss(reduction="batchmean")(
        F.log_softmax(student / TEMPERATURE, 1), F.softmax(teacher / TEMPERATURE, 1)
    )
    torch.testing.assert_close(kd_kl(student, teacher, TEMPERATURE), own * TEMPERATURE**2)


def test_kl_gradient_keeps_its_size_as_temperature_grows(logits):
    student, teacher = (x - x.mean(1, keepdim=True) for x in logits)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(kd_kl(student, teacher, 1e4), student)
    torch.testing.assert_close(gradient, (student - teacher).detach() / (CLASSES * BATCH), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("row", range(BATCH))
def test_dkd_with_the_coupled_weights_is_kl(row, logits, target):
    student, teacher, target = logits[0][row : row + 1], logits[1][row : row + 1], target[row : row + 1]
    others = 1 - (teacher / TEMPERATURE).softmax(1)[0, target].item()
    loss = kd_dkd(student, teacher, TEMPERATURE, target, alpha=1, beta=others)
    torch.testing.assert_close(loss, kd_kl(student, teacher, TEMPERATURE))


def test_dkd_weighs_the_other_classes_as_its_authors_do_unless_told_otherwise(logits, target):
    loss = kd_dkd(*logits, TEMPERATURE, target)
    torch.testing.assert_close(loss, kd_dkd(*logits, TEMPERATURE, target, alpha=1, beta=8))


def test_dkd_tckd_is_the_binary_kl_of_the_target(logits, target):
    student, teacher = ((x / TEMPERATURE).softmax(1).gather(1, target[:, None])[:, 0] for x in logits)
    binary = teacher * (teacher / student).log() + (1 - teacher) * ((1 - teacher) / (1 - student)).log()
    loss = kd_dkd(*logits, TEMPERATURE, target, alpha=1, beta=0)
    torch.testing.assert_close(loss, TEMPERATURE**2 * binary.mean())


def test_dkd_nckd_does_not_see_the_target_logit(logits, target):
    student, teacher = logits
    shift = F.one_hot(target, CLASSES) * 7.0
    expected = kd_dkd(student, teacher, TEMPERATURE, target, alpha=0, beta=1)
    torch.testing.assert_close(kd_dkd(student + shift, teacher, TEMPERATURE, target, alpha=0, beta=1), expected)


def test_dkd_refuses_soft_or_missing_targets(logits, target):
    with pytest.raises(InputError, match=r"one class index per image, got soft targets of shape \(6, 5\).*Mixup"):
        kd_dkd(*logits, TEMPERATURE, F.one_hot(target, CLASSES).double())
    with pytest.raises(InputError, match="one class index per image, got none"):
        kd_dkd(*logits, TEMPERATURE)


@pytest.mark.parametrize("side", [0, 1])
def test_standardized_does_not_see_shift_and_scale(side, logits):
    changed = list(logits)
    changed[side] = changed[side] * 4 - 3
    torch.testing.assert_close(kd_standardized(*changed, TEMPERATURE), kd_standardized(*logits, TEMPERATURE))


def test_standardized_is_kl_of_standard_logits(logits):
    student, teacher = ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in logits)
    torch.testing.assert_close(kd_standardized(*logits, TEMPERATURE), kd_kl(student, teacher, TEMPERATURE))


def test_standardized_sees_the_order(logits):
    assert kd_standardized(logits[0], -logits[0], TEMPERATURE) > 0.1


def test_dist_does_not_see_an_affine_change_of_the_teachers_probabilities(logits):
    student, teacher = logits
    probabilities = teacher.softmax(1)
    flatter = (0.4 * probabilities + 0.6 / CLASSES).log()
    torch.testing.assert_close(kd_dist(student, flatter, 1.0), kd_dist(student, teacher, 1.0))
    assert not torch.isclose(kd_kl(student, flatter, 1.0), kd_kl(student, teacher, 1.0), rtol=0.1)


def test_dist_is_one_minus_the_correlations(logits):
    student, teacher = ((x / TEMPERATURE).softmax(1) for x in logits)
    inter = torch.stack([torch.corrcoef(torch.stack([s, t]))[0, 1] for s, t in zip(student, teacher, strict=True)])
    intra = torch.stack([torch.corrcoef(torch.stack([s, t]))[0, 1] for s, t in zip(student.T, teacher.T, strict=True)])
    expected = TEMPERATURE**2 * (2 * (1 - inter.mean()) + 3 * (1 - intra.mean()))
    torch.testing.assert_close(kd_dist(*logits, TEMPERATURE, inter_weight=2, intra_weight=3), expected)


def authors_dist(student: Tensor, teacher: Tensor) -> Tensor:
    """DIST as its authors' code has it (arXiv 2205.10536), temperature 1, both weights 1."""

    def distance(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean()

    student, teacher = student.softmax(1), teacher.softmax(1)
    return distance(student, teacher) + distance(student.T, teacher.T)


def test_dist_is_the_authors_where_their_epsilon_does_not_matter():
    rng = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 64, 10, generator=rng, dtype=torch.float64) * 2
    torch.testing.assert_close(kd_dist(student, teacher, 1.0), authors_dist(student, teacher), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 20.0])
def test_dist_of_equal_logits_is_zero_for_many_classes(scale, dtype):
    """The authors' epsilon gives 0.90 at a scale of 20, and 12.5 for uniform logits at T = 2.5."""
    logits = scale * torch.randn(32, 1000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    assert kd_dist(logits, logits.clone(), 1.0).item() == pytest.approx(0, abs=1e-5)


def test_dist_of_a_student_without_opinion_is_not_zero():
    teacher = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))
    student = torch.zeros(8, 10, requires_grad=True)
    loss = kd_dist(student, teacher, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(2, abs=1e-2)
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("loss", [kd_dkd, kd_standardized])
def test_losses_that_compare_classes_refuse_one(loss):
    with pytest.raises(InputError, match=r"needs \d or more, got 1"):
        loss(torch.zeros(3, 1), torch.zeros(3, 1), 1.0, torch.zeros(3, dtype=torch.int64))


def test_standardized_logits_of_two_classes_are_refused():
    with pytest.raises(InputError, match="needs 3 or more, got 2"):
        kd_standardized(torch.randn(3, 2), torch.randn(3, 2), 1.0)
    assert kd_standardized(torch.randn(3, 3), torch.randn(3, 3), 1.0) > 0


def test_dist_of_one_image_has_no_intra_term(logits):
    student, teacher = logits[0][:1], logits[1][:1]
    expected = kd_dist(student, teacher, TEMPERATURE, intra_weight=0)
    torch.testing.assert_close(kd_dist(student, teacher, TEMPERATURE), expected)


def test_mse_does_not_depend_on_temperature(logits):
    torch.testing.assert_close(kd_mse(*logits, 1.0), kd_mse(*logits, 4.0))
    torch.testing.assert_close(kd_mse(*logits, 4.0), (logits[0] - logits[1]).square().mean())


def features(channels: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(3, channels, *size, generator=torch.Generator().manual_seed(seed))


def test_attention_map_has_unit_norm_per_image():
    attention = attention_map(features(7, (4, 5)))
    assert attention.shape == (3, 20)
    torch.testing.assert_close(attention.norm(dim=1), torch.ones(3))
    assert (attention >= 0).all()


def test_attention_map_does_not_see_scale_or_channel_order():
    x = features(7, (4, 5))
    torch.testing.assert_close(attention_map(-3.0 * x.flip(1)), attention_map(x))


def test_attention_map_is_the_mean_of_squares():
    x = torch.tensor([[1.0, 2.0], [-5.0, 1.0]]).view(1, 2, 1, 2)  # two channels, two positions
    torch.testing.assert_close(attention_map(x), F.normalize(torch.tensor([[13.0, 2.5]])))


def test_attention_map_of_dead_features_is_zero_with_a_finite_gradient():
    x = torch.zeros(1, 2, 3, 3, requires_grad=True)
    attention = attention_map(x)
    attention.sum().backward()
    assert (attention == 0).all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_attention_transfer_is_the_mean_squared_difference_of_maps():
    student, teacher = features(3, (4, 4)), features(8, (4, 4), seed=1)
    expected = (attention_map(student) - attention_map(teacher)).square().mean()
    torch.testing.assert_close(attention_transfer(student, teacher), expected)
    assert expected > 0


def test_attention_transfer_of_equal_attention_is_zero_whatever_the_channels():
    x = features(3, (4, 4))
    assert attention_transfer(x, 2 * torch.cat([x, x], 1)).item() == pytest.approx(0, abs=1e-12)


def test_attention_transfer_average_pools_a_larger_teacher_map():
    x = features(3, (4, 4))
    pooled = F.avg_pool2d(x.square().mean(1, keepdim=True), 2).sqrt()
    assert attention_transfer(pooled, x).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_attention_transfer_at_one_position_is_refused_with_its_remedy(role):
    """Such a map is 1 whatever the image: the loss would be 0 for ever, or pull the student to even attention."""
    sizes = {"student": (4, 4), "teacher": (4, 4), role: (1, 1)}
    remedy = rf"{role}'s features at several positions, got shape \(3, 5, 1, 1\); take larger images.*{role}_attention"
    with pytest.raises(InputError, match=remedy):
        attention_transfer(*(torch.ones(3, 5, *sizes[name]) for name in ("student", "teacher")))
    assert attention_transfer(features(5, (1, 4)), features(5, (1, 4), seed=1)) > 0  # one row is several positions


@pytest.mark.parametrize("size", [(2, 2), (2, 9), (9, 2)])
def test_attention_transfer_interpolates_other_sizes(size):
    uniform = torch.ones(3, 2, 4, 4)
    assert attention_transfer(uniform, torch.ones(3, 5, *size)).item() == pytest.approx(0, abs=1e-12)
    student = features(2, (4, 4)).requires_grad_()
    loss = attention_transfer(student, features(5, size, seed=1))
    loss.backward()
    assert loss > 0
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


def test_attention_transfer_of_half_precision_features_is_float32():
    student, teacher = features(3, (4, 4)) * 1000, features(3, (8, 8), seed=1)  # squares beyond float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = attention_transfer(student.half(), teacher.half())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, attention_transfer(student.half().float(), teacher.half().float()))


@pytest.mark.parametrize(("teacher_side", "student_side"), [(9, 3), (12, 4), (10, 4), (7, 3)])
def test_attention_of_a_larger_teacher_is_averaged_over_areas(teacher_side, student_side):
    """Bilinear points and area averages agree at a ratio of 2 alone."""
    rng = torch.Generator().manual_seed(0)
    teacher = torch.rand(2, 5, teacher_side, teacher_side, generator=rng, dtype=torch.float64)
    student = torch.rand(2, 3, student_side, student_side, generator=rng, dtype=torch.float64)
    activity = teacher.square().mean(1).numpy()
    edges = [
        (i * teacher_side // student_side, -(-(i + 1) * teacher_side // student_side)) for i in range(student_side)
    ]
    pooled = torch.tensor(
        [[[image[a:b, c:d].mean() for c, d in edges] for a, b in edges] for image in activity], dtype=torch.float64
    ).flatten(1)
    expected = F.mse_loss(attention_map(student), F.normalize(pooled, dim=1))
    torch.testing.assert_close(attention_transfer(student, teacher), expected)


@pytest.mark.parametrize("size", [(2, 9), (9, 2)])
def test_attention_that_is_larger_in_one_direction_alone_is_interpolated(size):
    student, teacher = features(3, (4, 4)), features(5, size, seed=1)
    activity = F.interpolate(teacher.square().mean(1, keepdim=True), (4, 4), mode="bilinear", antialias=True)
    expected = F.mse_loss(attention_map(student), F.normalize(activity.flatten(1), dim=1))
    torch.testing.assert_close(attention_transfer(student, teacher), expected)
