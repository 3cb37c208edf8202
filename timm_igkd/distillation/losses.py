"""What the student pays for disagreeing with the teacher: logit distillation losses and attention transfer.

Pure functions of two tensors, computed in float32 at least (also under autocast) and without detaching either side: the
task calls the teacher without gradient. Every logit loss is called alike, so that `KD_LOSSES[name]` needs no switch.
Each raises InputError for logits that are not (B, C) of one shape, and for a temperature not positive and finite.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_igkd.distillation.options import check_temperature
from timm_igkd.errors import InputError

LEAST_STANDARDIZED = 3
"""Classes that `kd_standardized` needs."""


def check_loss_type(loss_type: str, num_classes: int | None) -> None:
    """Raise InputError where a distillation loss has nothing to learn of so few classes; None: not known."""
    if loss_type == "standardized" and num_classes is not None and num_classes < LEAST_STANDARDIZED:
        raise InputError(
            f"loss_type 'standardized' needs {LEAST_STANDARDIZED} classes or more, got {num_classes}: standardised, "
            "two logits are the same two numbers for every image; use loss_type 'kl'"
        )


def kd_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float, target: Tensor | None = None) -> Tensor:
    """Kullback-Leibler distillation: T^2 KL(p_teacher || p_student), p = softmax(z / T), mean over the batch.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        temperature: T > 0; T^2 keeps the gradient's size as T grows.
        target: not used; part of the common signature.

    Returns:
        A scalar >= 0.

    Source: Hinton et al., arXiv 1503.02531; the distillation loss of arXiv 2506.14440.
    """
    student, teacher = _paired(student_logits, teacher_logits, temperature)
    return temperature**2 * _kl((teacher / temperature).log_softmax(1), (student / temperature).log_softmax(1)).mean()


def kd_standardized(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, target: Tensor | None = None
) -> Tensor:
    """`kd_kl` of logits standardised per sample: z -> (z - mean(z)) / std(z), the mean and std over the classes.

    The student then matches the order and the relative distances of the teacher's logits, not their size. Of two
    classes every pair of logits is standardised to the same two numbers, so that nothing is left to learn: refused.

    Args:
        student_logits: (B, C), C >= 3.
        teacher_logits: (B, C).
        temperature: T > 0, applied after standardising.
        target: not used; part of the common signature.

    Returns:
        A scalar >= 0, the same for a z + b (a > 0) in place of either side's z.

    Raises:
        InputError: fewer than 3 classes.

    Source: Sun et al., CVPR 2024, arXiv 2403.01427; the unbiased std is that of the authors' code. Deviation: their
    1e-7 added to the std is a 1e-8 added to the variance, so that constant logits have a finite gradient.
    """
    student, teacher = _paired(student_logits, teacher_logits, temperature, least_classes=LEAST_STANDARDIZED)
    return kd_kl(_standardize(student), _standardize(teacher), temperature)


def kd_dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    target: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """Decoupled distillation: T^2 (alpha TCKD + beta NCKD), mean over the batch.

    TCKD is the KL divergence between (p_t, 1 - p_t) of teacher and student, t the true class; NCKD that between the
    distributions over the other classes, each renormalised. Plain distillation ties the two: KD = TCKD + (1 - p_t) NCKD
    with the teacher's p_t.

    Args:
        student_logits: (B, C), C >= 2.
        teacher_logits: (B, C).
        temperature: T > 0.
        target: (B,) class indices. Soft targets are refused: a mixed image has no single class to decouple.
        alpha: weight of TCKD.
        beta: weight of NCKD; 8 is the authors' value for CIFAR-100.

    Returns:
        A scalar >= 0.

    Raises:
        InputError: no target, soft targets, or a single class.

    Source: Zhao et al., CVPR 2022, arXiv 2203.08679.
    """
    student, teacher = _paired(student_logits, teacher_logits, temperature, least_classes=2)
    if target is None or is_soft(target):
        found = "none" if target is None else f"soft targets of shape {tuple(target.shape)}"
        raise InputError(
            f"loss_type 'dkd' needs one class index per image, got {found}; "
            "use loss_type 'kl', or switch off Mixup and CutMix"
        )
    student_binary, student_others = _decouple(student / temperature, target)
    teacher_binary, teacher_others = _decouple(teacher / temperature, target)
    tckd = _kl(teacher_binary, student_binary)
    nckd = _kl(teacher_others, student_others)
    return temperature**2 * (alpha * tckd + beta * nckd).mean()


def kd_dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    target: Tensor | None = None,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
) -> Tensor:
    """DIST: T^2 (inter_weight (1 - r_inter) + intra_weight (1 - r_intra)), r the mean Pearson correlation.

    r_inter correlates teacher and student over the classes of one image (rows of p = softmax(z / T)), r_intra over the
    images of one class (columns of p). A batch of one image has no columns to correlate: its intra term is left out.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        temperature: T > 0.
        target: not used; part of the common signature.
        inter_weight: the paper's beta; the task leaves it at 1.
        intra_weight: the paper's gamma; the task leaves it at 1.

    Returns:
        A scalar >= 0, the same for a p + b (a > 0) in place of either side's probabilities p.

    Source: Huang et al., NeurIPS 2022, arXiv 2205.10536. Deviation: the authors add 1e-8 to the product of the norms in
    a correlation, which then is below 1 for equal logits wherever probabilities hardly vary (0.9 for 1,000 classes at
    logits of 20); here both vectors get one more coordinate of 1e-6, which leaves 0 for equal logits, and the authors'
    value where their epsilon does not matter.
    """
    student, teacher = _paired(student_logits, teacher_logits, temperature)
    student, teacher = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
    loss = inter_weight * _pearson_distance(student, teacher)
    if len(student) > 1:
        loss = loss + intra_weight * _pearson_distance(student.T, teacher.T)
    return temperature**2 * loss


def kd_mse(student_logits: Tensor, teacher_logits: Tensor, temperature: float, target: Tensor | None = None) -> Tensor:
    """Mean squared difference of the logits, over batch and classes.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        temperature: cancels, as T^2 mse(z / T) = mse(z); part of the common signature.
        target: not used; part of the common signature.

    Returns:
        A scalar >= 0.

    Source: Ba & Caruana, arXiv 1312.6184; Kim et al., arXiv 2105.08919.
    """
    student, teacher = _paired(student_logits, teacher_logits, temperature)
    return F.mse_loss(student, teacher)


#: name -> loss(student_logits, teacher_logits, temperature, target), a scalar that is 0 for equal logits
KD_LOSSES: dict[str, Callable[..., Tensor]] = {
    "kl": kd_kl,
    "dkd": kd_dkd,
    "dist": kd_dist,
    "standardized": kd_standardized,
    "mse": kd_mse,
}


def attention_map(features: Tensor) -> Tensor:
    """Return where features are active: the mean over channels of their squares, flattened, of L2 norm 1 per image.

    Args:
        features: (B, C, H, W).

    Returns:
        (B, H * W), non-negative; the same for features times a constant; zeros for features that are all zero.

    Source: Zagoruyko & Komodakis, ICLR 2017, arXiv 1612.03928.
    """
    return F.normalize(_activity(features).flatten(1), dim=1)


def attention_transfer(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean squared difference of the two attention maps, over images and positions.

    Where the sizes differ, the teacher's map is brought to the student's before it is normalised (`resized`).

    Args:
        student_features: (B, C, H, W).
        teacher_features: (B, C', H', W'); any number of channels, any size.

    Returns:
        A scalar >= 0.

    Raises:
        InputError: features of one position, whose attention map is 1 whatever the image.

    Source: arXiv 1612.03928; attention arms of arXiv 2506.14440.
    """
    for role, features in (("student", student_features), ("teacher", teacher_features)):
        if features.shape[-2:].numel() == 1:
            raise InputError(
                f"attention transfer needs the {role}'s features at several positions, got shape "
                f"{tuple(features.shape)}; take larger images, an earlier entry of forward_intermediates as "
                f"{role}_attention_index, or attention_loss_weight 0"
            )
    teacher = resized(_activity(teacher_features), student_features)
    return F.mse_loss(attention_map(student_features), F.normalize(teacher.flatten(1), dim=1))


def resized(teacher: Tensor, student: Tensor) -> Tensor:
    """Return the teacher's maps (B, 1, H', W') at the size of the student's (B, C, H, W), as (B, 1, H, W).

    By average pooling if the student's is the smaller one, else by bilinear interpolation.
    """
    height, width = student.shape[-2:]
    if height <= teacher.shape[-2] and width <= teacher.shape[-1]:
        return F.adaptive_avg_pool2d(teacher, (height, width))
    return F.interpolate(teacher, (height, width), mode="bilinear", align_corners=False, antialias=True)


def is_soft(target: Tensor) -> bool:
    """Return whether targets are class probabilities, as Mixup and CutMix make them, not class indices."""
    return target.ndim > 1 or target.is_floating_point()


def _paired(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, least_classes: int = 1
) -> tuple[Tensor, Tensor]:
    """Return both logits in at least float32, checked: shapes that broadcast would give a wrong loss silently."""
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise InputError(
            f"student and teacher logits must have one shape (batch, classes), got {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}; select the teacher's outputs with teacher_class_indices"
        )
    if student_logits.shape[1] < least_classes:
        raise InputError(
            f"this loss compares classes with each other, so it needs {least_classes} or more, got "
            f"{student_logits.shape[1]}; use loss_type 'mse' or 'kl'"
        )
    check_temperature(temperature)
    return at_least_float32(student_logits), at_least_float32(teacher_logits)


def at_least_float32(x: Tensor) -> Tensor:
    """Return a tensor in float32, or in what it has where that is more."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def _standardize(logits: Tensor) -> Tensor:
    variance, mean = torch.var_mean(logits, dim=1, keepdim=True)
    return (logits - mean) * (variance + 1e-8).rsqrt()


def _decouple(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return log (p_t, 1 - p_t), (B, 2), and the other classes' log-probabilities among themselves, (B, C - 1)."""
    index = torch.arange(logits.shape[1] - 1, device=logits.device)
    others = logits.gather(1, index + (index >= target[:, None]).long())
    binary = torch.cat([logits.gather(1, target[:, None]), others.logsumexp(dim=1, keepdim=True)], dim=1)
    return binary.log_softmax(1), others.log_softmax(1)


def _pearson_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - the Pearson correlation of the rows of `a` and `b`, mean over rows.

    The coordinate that both rows share, given as its square, keeps the gradient finite for rows without spread, and two
    of them equal.
    """
    shared = 1e-12
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    norms = (a.square().sum(dim=1) + shared).sqrt() * (b.square().sum(dim=1) + shared).sqrt()
    return (1 - ((a * b).sum(dim=1) + shared) / norms).clamp_min(0).mean()


def _activity(features: Tensor) -> Tensor:
    """(B, 1, H, W): the mean over channels of the squared features."""
    return at_least_float32(features).square().mean(dim=1, keepdim=True)
